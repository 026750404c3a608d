"""Lists of walks: those of CI, and every combination of options, which runs nightly."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from testkit.rehearsal.evaluation import PARTS
from testkit.rehearsal.walk import Walk

MICRO, CHECKPOINTING, RING = "engine.micro_batches=4", "engine.activation_checkpointing=true", "engine.loss_form=ring"
PADDED = "engine.panel_sizes=4"
RANKS = {"1gpu": 1, "8xa100": 8, "8xh100": 8, "multinode_h100": 64, "demo_cpu": 1, "paper_h100": 8}
"""Number of ranks that each config is written for."""
STAGES = (1, 3)
"""Stages of ZeRO whose combinations are walked. The order of calls of stage 2 is that of stage 1."""
INFERENCE = ("validation", "predict", "embed", *PARTS)
MOST_SPOTS = 8192
"""Most spots of a rank: the batch of ``multinode_h100``, 65,536 spots, and its copy for the upload would take 20 GB of
host memory on one rank."""


def walks(everything: bool = False) -> list[Walk]:
    """Return the walks of CI or, with ``everything``, all combinations of options; the longest walks come first."""
    out = list(dict.fromkeys([*_of_ci(), *(_grid() if everything else ())]))
    return sorted(out, key=lambda w: (MICRO not in w.overrides, RING not in w.overrides, w.config))


def _of_ci() -> Iterator[Walk]:
    for config, ranks in RANKS.items():
        yield Walk(config, ranks)
        if config in ("1gpu", "8xh100", "multinode_h100"):
            yield Walk(config, ranks, (MICRO, CHECKPOINTING))
            if ranks > 1:
                yield Walk(config, ranks, (RING,))
    yield Walk("1gpu", part="logged step")
    yield Walk("8xh100", 2)
    for stage in (2, 3):
        yield Walk("8xh100", 8, _zero(stage))
    yield Walk("1gpu", overrides=(PADDED,))
    for part in INFERENCE:
        yield Walk("1gpu", part=part)


def _grid() -> Iterator[Walk]:
    """Yield steps of every config in one process, over 2 ranks with DDP, and with ZeRO, in all combinations, and inference.

    ZeRO has the number of ranks of the config, or 2 if it is 1. Configs of several ranks are also walked with their own engine.
    """
    for config, ranks in RANKS.items():
        engine = Walk(config).load().engine
        own = {engine.zero_stage} if engine.kind == "deepspeed" else set()
        engines = [(1, ("engine.kind=single",)), (2, ("engine.kind=ddp",))]
        engines += [(max(2, ranks), _zero(stage)) for stage in STAGES if stage not in own]
        if ranks > 1:
            engines.append((ranks, ()))
        for number, chosen in engines:
            for form, micro, again in product((RING, ""), (MICRO, ""), (CHECKPOINTING, "")):
                if form and number == 1:  # one process has no ranks to send to
                    continue
                options = tuple(filter(None, (*_fitting(config, number), *chosen, form, micro, again)))
                yield Walk(config, number, options)
        for part in INFERENCE:
            yield Walk(config, part=part)


def _zero(stage: int) -> tuple[str, ...]:
    return "engine.kind=deepspeed", f"engine.zero_stage={stage}"


def _fitting(config: str, ranks: int) -> tuple[str, ...]:
    """Return the override that reduces the batch to ``MOST_SPOTS`` spots per rank, if it is larger."""
    size = Walk(config).load().data.batch_size
    return (f"data.batch_size={MOST_SPOTS * ranks}",) if size > MOST_SPOTS * ranks else ()
