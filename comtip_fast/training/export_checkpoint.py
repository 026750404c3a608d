"""Export from a checkpoint of any engine and number of ranks, even while the run is in progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from comtip_shards.storage.remote import is_url

from comtip_fast.config.io import config_from_dict, load_config
from comtip_fast.shards import ShardPaths, names_of_sets, shards_of_run
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.content import problem_of
from comtip_fast.training.checkpoint.reading import HeldReader
from comtip_fast.training.checkpoint.resume import CHECKPOINTS
from comtip_fast.training.checkpoint.run_state import (
    GENES,
    RunState,
    changed_inputs,
    described_changes,
    with_earlier_values,
)
from comtip_fast.training.checkpoint.schema import check_state, load_weights
from comtip_fast.training.checkpoint.set_changes import first_sets, further_sets
from comtip_fast.training.checkpoint.store import Checkpoint, CheckpointError
from comtip_fast.training.task import build_task
from comtip_fast.training.update.ema import load_averages
from comtip_fast.training.warm_start import parents_of

ATTEMPTS = 10
"""Number of attempts to read a checkpoint that a run in progress may replace."""


def export_checkpoint(
    run_dir: Path, which: str, out: Path, shards: ShardPaths | None = None, settings: Sequence[str] = ()
) -> int:
    """Write an export from one checkpoint and return its step.

    Parameters
    ----------
    run_dir
        Folder of the run.
    which
        ``newest``, ``best`` (best validation score so far) or a step.
    out
        Folder of the export.
    shards
        Shard set that the run was trained on up to this step, or a sequence of these sets; None searches for the sets that the run's
        config names (:func:`comtip_fast.shards.shards_of_run`).
    settings
        Keys of the readout to change, e.g. ``readout.kind=linear``. The readout is fitted at export, so no training is needed.

    Raises
    ------
    ValueError
        ``shards`` is None and the run's config names a URL, which is not opened because a file in a run folder must not start
        a download; or the run's config or lineage, the shard set, the gene vectors or ``settings`` cannot be used.
    FileNotFoundError
        The shard set or the gene vectors are not found.
    FileExistsError
        ``out`` contains a file that is not part of an export.
    CheckpointError
        The run has no such checkpoint, the checkpoint is damaged, or the shard set, tokenizer, gene vectors or trained genes are
        not those of the run.
    """
    other = [item for item in settings if not item.startswith("readout.")]
    if other:
        raise ValueError(
            f"{other[0]}: only keys of the readout (readout.kind, ...) can be changed at export; train again for others"
        )
    step, loaded = _read(run_dir, which)
    folder = checkpoints.folder_of(run_dir / CHECKPOINTS, step)
    check_state(loaded.state, folder, step)
    config = with_earlier_values(loaded.state["config"], load_config(run_dir / "config.yaml", settings))
    stated = names_of_sets(config.data.shards)
    stated = stated[: len(names_of_sets(config_from_dict(loaded.state["config"], str(folder)).data.shards))]
    if shards is None:
        # Sets that were appended after this step did not influence its weights.
        opened = tuple(_stated_set(run_dir, name) for name in stated)
    else:
        opened = names_of_sets(shards)
    config = replace(config, data=replace(config.data, shards=opened[0] if len(opened) == 1 else opened))
    # The checkpoint holds all weights; no initial weights are loaded.
    parents = parents_of(config, run_dir, required=False)
    then = loaded.state["fingerprint"]
    cpu = torch.device("cpu")
    task = build_task(config, cpu, initialise=False, parents=parents, first_sets=first_sets(then))
    task.note_extensions(RunState.from_plain(loaded.state).extensions)
    now = task.fingerprint()
    changed = ["shards"] if further_sets(then, now) else changed_inputs(then, now)
    if changed:
        shown = described_changes(changed, then, now, opened if shards is None else stated, opened)
        raise CheckpointError(
            f"{run_dir}: the inputs differ from those of training ({shown}; the shard set is {', '.join(opened)}); "
            f"{_fix_of(changed)}"
        )
    load_weights(task.module, HeldReader(loaded, folder))
    load_averages(task.module, loaded.ema)
    task.module.eval()
    task.export(out)
    return step


def _fix_of(changed: list[str]) -> str:
    """Return the fix to state in the error about inputs that differ; ``changed`` is the result of :func:`changed_inputs`."""
    if "tokenizer" in changed:
        return "use the release that trained the run"
    if "shards" not in changed and "gene vectors" in changed:
        return "restore the file that text.gene_vectors names"
    if changed == [GENES]:
        return "restore the keys genes.* in the run's config.yaml, or use the release that trained the run"
    return "give the shard sets that the run had at this step with `shards`"


def _read(run_dir: Path, which: str) -> tuple[int, Checkpoint]:
    """Read a checkpoint and return its step; retry if a run in progress has replaced the checkpoint with a newer one."""
    root = run_dir / CHECKPOINTS
    for attempt in range(ATTEMPTS):
        steps = checkpoints.steps_of(root)
        if not steps:
            raise CheckpointError(
                f"{run_dir}: no checkpoint in this folder; give the folder of a run that has written one"
            )
        try:
            return _choose(root, which, steps)
        except (CheckpointError, OSError):
            if attempt == ATTEMPTS - 1 or checkpoints.steps_of(root) == steps:
                raise
    raise AssertionError("the last attempt raises")


def _choose(root: Path, which: str, steps: list[int]) -> tuple[int, Checkpoint]:
    """Return the step and the content of the checkpoint that ``which`` selects."""
    found = checkpoints.newest_good(root, checkpoints.load_state) if which in ("newest", "best") else None
    if which == "newest" and found is not None:
        return found[0], checkpoints.load(checkpoints.folder_of(root, found[0]), moments=False, hashed=True)
    available = ", ".join(str(s) for s in steps)
    if found is not None:
        check_state(found[1], checkpoints.folder_of(root, found[0]), found[0])
    elif which in ("newest", "best"):
        raise CheckpointError(
            f"{root}: none of the {len(steps)} checkpoints can be read (see the warnings above); export another run"
        )
    step = found[1]["best_step"] if found is not None else _step(which)
    if found is not None and step == 0:
        raise CheckpointError(
            f"{root}: no checkpoint has a validation score yet, so none is the best; choose newest or a step of {available}"
        )
    if step not in checkpoints.steps_of(root):
        if found is not None:
            raise CheckpointError(
                f"{root}: the best checkpoint, that of step {step}, is gone or not complete; choose newest or a step of {available}"
            )
        raise CheckpointError(f"{root}: no complete checkpoint {which!r}; choose newest, best or a step of {available}")
    try:
        return step, checkpoints.load(checkpoints.folder_of(root, step), moments=False)
    except CheckpointError as error:
        raise CheckpointError(f"{problem_of(error)}; choose newest or another step of {available}") from error


def _stated_set(run_dir: Path, stated: str) -> str:
    """Return the path of a shard set that the run's config states."""
    if is_url(stated):
        raise ValueError(
            f"{run_dir / 'config.yaml'}: data.shards is the URL {stated}; URLs in a run's config are not downloaded; if you "
            "trust this URL, give all sets of the run with `shards`"
        )
    found = shards_of_run(run_dir, stated)
    if not (Path(found) / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{run_dir / 'config.yaml'}: data.shards is {stated}, but there is no shard set at this path, in the run folder or "
            "relative to a folder above it; give the shard set of the run with `shards`"
        )
    return found


def _step(which: str) -> int:
    """Return ``which`` as a step; -1, which no checkpoint has, if it is not a number."""
    return int(which) if which.isdigit() else -1
