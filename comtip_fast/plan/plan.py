"""Predict memory, computation, communication and time of a run on a cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from comtip_fast.config.schema import RunConfig
from comtip_fast.plan.cost import Cost, forward_only
from comtip_fast.plan.engine import EngineSpec, engine_of
from comtip_fast.plan.hardware import Cluster
from comtip_fast.plan.host import launches, operators
from comtip_fast.plan.loss_parts import level, pooling
from comtip_fast.plan.memory import MemoryRow, on_device, state_rows, step_rows
from comtip_fast.plan.parts import image_head, sentence_table, step_parts, vision
from comtip_fast.plan.rank_share import RankShare, StepPart
from comtip_fast.plan.sizes import Inputs, Sizes, mean_panel, sizes_of
from comtip_fast.plan.timing import PartTime, compute_time, optimizer_cost, time_collectives, time_parts
from comtip_fast.plan.traffic import Collective, step_traffic
from comtip_fast.training.validation import KEPT_BYTES, SPACE_GENES, SPACE_SPOTS, VALIDATION_GENES


@dataclass(frozen=True, kw_only=True)
class LoaderRate:
    """Loading rates per node: the rate that the step requires, and the available rate."""

    tiles_per_s: float
    """Required tiles per second."""
    bytes_per_s: float
    """Required bytes of encoded tiles per second."""
    available_tiles_per_s: float | None
    """Measured tiles per second, or the rate of the assumed cores. None if loading does not limit the step: on a CPU without a
    measured rate, where it shares the cores with the step, and with the features of a frozen stem in memory."""
    measured: bool
    """Whether a measured rate was given."""


@dataclass(frozen=True, kw_only=True)
class ValidationTime:
    """Time of one validation after the first, whose sections are split over the ranks."""

    spots: int
    seconds: float
    flops: float
    """FLOPs of the rank with the most spots."""
    every: int
    """Steps between two validations."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predictions for one run on one cluster."""

    name: str
    cluster: Cluster
    engine: EngineSpec
    sizes: Sizes
    """Sizes of the step, with a padded panel if ``engine.panel_sizes`` is set."""
    unpadded: Sizes
    """The same with the panel as it is drawn."""
    inputs: Inputs
    share: RankShare
    parts: tuple[StepPart, ...]
    memory: tuple[MemoryRow, ...]
    traffic: tuple[Collective, ...]
    times: tuple[PartTime, ...]
    loader: LoaderRate
    operators: int
    """Operators that the host issues in a step without compilation."""
    launches: int
    """Launches of this package's kernels that the host issues in a step."""
    validation: ValidationTime | None
    """None if ``train.validate_every`` is 0."""

    @property
    def step_seconds(self) -> float:
        """Seconds of one step."""
        return _total(self.times)

    @property
    def host_seconds(self) -> float:
        """Seconds that the host needs to issue the operators and launches of a step without compilation."""
        return (self.operators + self.launches) * self.cluster.efficiency.launch_s

    @property
    def spots_per_s(self) -> float:
        """Spots of the global batch per second."""
        return self.sizes.B / self.step_seconds

    @property
    def device_bytes(self) -> float:
        """Bytes of tensors on one device."""
        return on_device(self.memory)

    @property
    def fits(self) -> bool:
        """Whether tensors take at most ``FILL`` of the device memory."""
        return self.device_bytes <= FILL * self.cluster.device.memory

    @property
    def flops(self) -> float:
        """FLOPs per rank and step, with recomputation."""
        return sum(p.sum("flops") + p.sum("back_flops") for p in self.parts)

    @property
    def moved(self) -> float:
        """Bytes that the operators of a rank's step read and write, every operand and result once, the optimizer's included."""
        W = self.cluster.ranks if self.engine.zero_stage else 1
        parts = sum(p.sum("moved") + p.sum("back_moved") for p in self.parts)
        return parts + optimizer_cost(self.sizes.trained / W).moved

    @property
    def utilisation(self) -> float:
        """Share of the device's peak FLOP/s that the step reaches."""
        peak = self.cluster.device.bf16 if self.engine.precision.is_bf16 else self.cluster.device.fp32
        return self.flops / self.step_seconds / peak


FILL = 0.92
"""Share of the device memory for tensors; the rest is for the context, the allocator and the kernels' workspace."""


def make_plan(
    config: RunConfig,
    cluster: Cluster,
    inputs: Inputs | None = None,
    *,
    engine: EngineSpec | None = None,
    sizes: Sizes | None = None,
    loader_tiles_per_s: float | None = None,
    validation_spots: int | None = None,
) -> Plan:
    """Predict memory, computation, communication and time of a run on a cluster.

    Parameters
    ----------
    config
        The run.
    cluster
        The devices and links to plan for.
    inputs
        Properties of the data that the config does not contain.
    engine
        Replaces the config's engine, to compare designs.
    sizes
        The sizes, if known; otherwise the model is built on the meta device.
    loader_tiles_per_s
        Measured rate of the loader per node; None assumes the cores and the time per tile of ``cluster.efficiency`` or, on a
        CPU, that loading does not limit the step. A step with the features of a frozen stem in memory loads no tiles.
    validation_spots
        Number of spots that a validation scores, in sections of ``train.validate_spots`` spots; None assumes one section.

    Raises
    ------
    ValueError
        The batch has fewer spots than there are ranks, the engine runs on one device only, no costs are known for the
        blocks of the image encoder, or the rate of the loader or the number of validation spots is not positive.
    """
    if loader_tiles_per_s is not None and not 0 < loader_tiles_per_s < math.inf:
        raise ValueError(
            f"`loader_tiles_per_s` {loader_tiles_per_s:g}: must be a finite number above 0; leave it out to assume a rate"
        )
    if validation_spots is not None and validation_spots < 1:
        raise ValueError(f"`validation_spots` {validation_spots}: must be at least 1; leave it out for the default")
    inputs, W = inputs or Inputs(), cluster.ranks
    drawn = sizes or sizes_of(config, inputs)
    if drawn.B < W:
        raise ValueError(
            f"data.batch_size={drawn.B}: too small for {W} ranks, which need at least one spot each; raise it or plan for fewer ranks"
        )
    e = engine or engine_of(config, W, cluster.device.name != "cpu")
    s = _of_step(drawn, e, cluster)
    w = rank_share(s, e, cluster)
    parts = step_parts(s, w)
    traffic = step_traffic(s, e, W)
    times = [
        *time_parts(parts, cluster, e.precision),
        _optimizer_time(s, e, cluster),
        *time_collectives(traffic, cluster, _overlap(parts, cluster, e)),
    ]
    issued, launched = operators(s, e, W), launches(s, e, W)
    if cluster.device.name != "cpu" and not e.compiled:
        times += _deficit("host", (issued + launched) * cluster.efficiency.launch_s, times)
    tiles = s.B / cluster.nodes / _total(times) if s.loads_tiles else 0.0
    rate = loader_tiles_per_s if loader_tiles_per_s is not None else assumed_loader_rate(cluster, inputs.tile_px)
    available = rate if s.loads_tiles else None
    if available is not None:
        times += _deficit("loader", s.B / cluster.nodes / available, times)
    return Plan(
        name=config.name,
        cluster=cluster,
        engine=e,
        sizes=s,
        unpadded=drawn,
        inputs=inputs,
        share=w,
        parts=tuple(parts),
        memory=(*state_rows(s, e, W), *step_rows(s, e, w, parts, W)),
        traffic=tuple(traffic),
        times=tuple(times),
        loader=LoaderRate(
            tiles_per_s=tiles,
            bytes_per_s=tiles * s.tile_bytes,
            available_tiles_per_s=available,
            measured=loader_tiles_per_s is not None,
        ),
        operators=issued,
        launches=launched,
        validation=_validation(config, drawn, e, cluster, rate, validation_spots),
    )


def _of_step(s: Sizes, e: EngineSpec, c: Cluster) -> Sizes:
    """Return the sizes of a step with these sizes of a drawn panel, which a GPU may pad."""
    if c.device.name == "cpu":
        return s
    return s.padded(c.ranks if e.shares_table(s.G * s.Q, c.ranks) else 1)


def _total(times: Sequence[PartTime]) -> float:
    return sum(t.seconds for t in times)


def _deficit(name: str, needed: float, times: Sequence[PartTime]) -> list[PartTime]:
    """Return the wait for the host or the loader, which needs ``needed`` seconds per step; empty if the step is not faster."""
    wait = needed - _total(times)
    return [PartTime(f"wait: {name}", wait, name)] if wait > 0 else []


def assumed_loader_rate(cluster: Cluster, tile_px: int) -> float | None:
    """Return the tiles of ``tile_px`` px per second and node that the assumed cores load; None on a CPU."""
    if cluster.device.name == "cpu":
        return None
    f = cluster.efficiency
    return cluster.per_node * f.cores * 1e3 / f.tile_ms * (224 / tile_px) ** 2


def _validation(
    config: RunConfig, s: Sizes, e: EngineSpec, c: Cluster, loader_rate: float | None, spots: int | None
) -> ValidationTime | None:
    """Return the time of a validation; None without validation.

    A rank scores whole sections, which are assumed to have ``train.validate_spots`` spots. Of each, it encodes the spots and the
    sentences of the most variable genes, or waits for the loader if that takes longer. Tiles that fit into the memory that the
    validation keeps are read by the first one only, whose reading is not included.
    """
    if config.train.validate_every == 0:
        return None
    largest = config.train.validate_spots
    spots = largest if spots is None else spots
    own_sections = ceil(ceil(spots / largest) / c.ranks)
    own = min(spots, own_sections * largest)
    costs = _validation_costs(s, e, c, own, own_sections)
    seconds = compute_time(costs, c, e.precision).forward
    if loader_rate is not None:
        kept = KEPT_BYTES // (4 * s.P * s.patch_inputs if s.has_stem else 3 * s.S**2)
        seconds = max(seconds, max(0, own - kept) * c.per_node / loader_rate)
    return ValidationTime(
        spots=spots, seconds=seconds, every=config.train.validate_every, flops=sum(one.flops for one in costs)
    )


def _validation_costs(s: Sizes, e: EngineSpec, c: Cluster, spots: int, sections: int) -> list[Cost]:
    """Return the costs of scoring ``spots`` spots of ``sections`` sections on one rank, which encodes the sentences of each section.

    The genes of the score and those of the shared space are encoded separately.
    """

    def share_of(sizes: Sizes) -> RankShare:
        share = rank_share(sizes, e, c)
        return replace(share, spots=spots, micro_batches=1, checkpointing=False, table_rows=sizes.G * sizes.Q)

    scored, space = (s.at_panel(min(n, s.genes)) for n in (VALIDATION_GENES, SPACE_GENES))
    costs = [*vision(s, share_of(s), s.P, masked=False), *image_head(s, share_of(s))]
    costs += level(scored, share_of(scored))
    for _ in range(sections):
        costs += sentence_table(scored, share_of(scored)) + sentence_table(space, share_of(space))
        costs += pooling(space, share_of(space), min(spots, SPACE_SPOTS))
    return forward_only(costs)


def at_mean_panel(plan: Plan, config: RunConfig) -> Plan:
    """Return the plan of a training step for the mean number of genes in a panel instead of the largest."""
    drawn = plan.unpadded
    G = mean_panel(min(config.panel.min_genes, drawn.G), drawn.G)
    return make_plan(
        config,
        plan.cluster,
        plan.inputs,
        engine=plan.engine,
        sizes=drawn.at_panel(G),
        loader_tiles_per_s=plan.loader.available_tiles_per_s if plan.loader.measured else None,
        validation_spots=plan.validation.spots if plan.validation else None,
    )


def rank_share(s: Sizes, e: EngineSpec, c: Cluster) -> RankShare:
    """Return the share of the rank with the most spots."""
    own = ceil(s.B / c.ranks)
    rows = s.G * s.Q
    if e.shares_table(rows, c.ranks):
        rows = ceil(rows / c.ranks)
    mispaired = s.hard_columns and s.G >= 2 and s.has_nce
    return RankShare(
        spots=own,
        micro_batches=e.micro_batches,
        images=s.B,
        columns=2 * own if mispaired else own,
        table_rows=rows,
        precision=e.precision,
        gpu=c.device.name != "cpu",
        checkpointing=e.activation_checkpointing,
        compiled=e.compiled,
        fused=e.fused,
        ring=e.loss_form == "ring" and c.ranks > 1,
    )


def _optimizer_time(s: Sizes, e: EngineSpec, c: Cluster) -> PartTime:
    """Return the time of an optimizer step on the parameters that a rank owns."""
    elements = s.trained / (c.ranks if e.zero_stage else 1)
    time = compute_time([optimizer_cost(elements)], c, e.precision)
    return PartTime("optimizer", time.forward + time.backward, time.bound)


def _overlap(parts: Sequence[StepPart], c: Cluster, e: EngineSpec) -> dict[str, float]:
    """Return the seconds of computation that communication can overlap with: in forward pass, backward pass and InfoNCE."""
    times = {part.name: compute_time(part.costs, c, e.precision, part.times) for part in parts}
    overlap = {"forward": sum(t.forward for t in times.values()), "backward": sum(t.backward for t in times.values())}
    if "InfoNCE" in times:
        overlap["InfoNCE"] = times["InfoNCE"].forward + times["InfoNCE"].backward
    return overlap
