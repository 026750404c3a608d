"""Saving of checkpoints in parts during training: every rank writes its own part, and rank 0 publishes them when all are complete.

Threads of different ranks do not communicate. The ranks agree at the end of a step that all parts are written
(:meth:`ShardSaver.complete`); only then does the checkpoint get its final name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from comtip_fast.collectives import Group
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.async_writer import Writer
from comtip_fast.training.checkpoint.content import CheckpointError
from comtip_fast.training.checkpoint.parts.reader import buffer_names
from comtip_fast.training.checkpoint.parts.writer import RankPart, Written, index_of, part_of_rank, write_part
from comtip_fast.training.distributed.process_group import Pause, on_every_rank, on_rank_zero
from comtip_fast.training.engines.base import Engine, ParameterPart
from comtip_fast.training.protocol import AVERAGE, WEIGHT


@dataclass
class _InFlight:
    """A checkpoint whose parts are being written."""

    step: int
    folder: Path
    state: dict[str, Any]
    written: Written | None = None


class ShardSaver:
    """Writes checkpoints in parts; :meth:`start` and :meth:`complete` are collective calls.

    Parameters
    ----------
    root
        Folder of the checkpoints, on a file system that all ranks share.
    group
        Ranks of the run.
    writer
        Writer thread of this rank.
    background
        Whether ``writer`` writes; otherwise :meth:`start` returns when the checkpoint is complete.
    pause
        See :func:`.process_group.on_rank_zero`.
    """

    def __init__(self, root: Path, group: Group, writer: Writer, *, background: bool, pause: Pause) -> None:
        self.root, self.group, self.writer, self.background, self.pause = root, group, writer, background, pause
        self._in_flight: _InFlight | None = None
        self._prune: Callable[[], None] = lambda: None

    @property
    def writing(self) -> bool:
        """Whether this rank's part is being written."""
        return self._in_flight is not None and self.writer.busy

    def start(
        self,
        step: int,
        engine: Engine,
        state: dict[str, Any],
        prune: Callable[[], None],
        averages: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write this rank's part of weights, optimizer state and averages; with ``background``, copy it and start to write the copy.

        A previous checkpoint is completed first.

        Parameters
        ----------
        step
            Step of the checkpoint.
        engine
            Engine whose ``shards`` is not None.
        state
            Content of ``state.json``.
        prune
            Deletes old checkpoints; called on rank 0 when the checkpoint is complete.
        averages
            This rank's part of the averaged weights (:meth:`.ema.WeightAverage.tensors`); None without averages.

        Raises
        ------
        RestartError
            A disk is full or fails, on any rank, in this or the previous checkpoint.
        CheckpointError, TrainingError
            A rank does not find the folder that rank 0 has created: :class:`CheckpointError` on this rank,
            :class:`TrainingError` on the others.
        """
        self.complete()
        name = on_rank_zero(lambda: self._new_folder(step), self.group, self.pause)
        part = _part_of(engine, self.group.rank, averages or {}, copy=self.background)
        job = _InFlight(step, self.root / name, state)
        self._in_flight, self._prune = job, prune
        if self.background:
            self.writer.submit(lambda: self._write(job, part))
            return
        self.complete(lambda: self._write(job, part))

    def complete(self, write: Callable[[], None] = lambda: None) -> None:
        """Wait until the parts of all ranks are written, and publish the checkpoint; do nothing if no checkpoint is in flight.

        ``write`` is called first. The checkpoint is published in the thread of rank 0, if it was written in the background.
        Raises the same errors as :meth:`start`.
        """
        job, self._in_flight = self._in_flight, None
        if job is None:
            return

        def own() -> Written:
            write()
            self.writer.drain()
            assert job.written is not None
            return job.written

        on_every_rank(own, lambda parts: self._publish(job, parts), self.group, self.pause)

    def _new_folder(self, step: int) -> str:
        """Wait until the previous checkpoint is published, and return the name of a folder for the parts of the next one."""
        self.writer.drain()
        return checkpoints.new_parts_folder(self.root, step)

    def _write(self, job: _InFlight, part: RankPart) -> None:
        if not job.folder.is_dir():
            raise CheckpointError(
                f"{job.folder}: this folder, which rank 0 has created, does not exist on rank {part.rank}; put the run folder on a "
                "file system that all ranks share, or set train.checkpoint=whole"
            )
        with checkpoints.cannot_write(self.root, job.step, part.bytes):
            job.written = write_part(job.folder, part)

    def _publish(self, job: _InFlight, parts: list[Written]) -> None:
        """Publish the checkpoint on rank 0."""
        index, prune = index_of(parts), self._prune

        def work() -> None:
            checkpoints.publish_parts(self.root, job.step, job.folder, index, job.state)
            prune()

        if self.background:
            self.writer.submit(work)
        else:
            work()


def _part_of(engine: Engine, rank: int, averages: Mapping[str, Tensor], *, copy: bool) -> RankPart:
    """Return what this rank writes of the engine's module and of the averages."""
    assert engine.shards is not None
    module: nn.Module = engine.module
    buffers = {name: module.get_buffer(name) for name in buffer_names(module)} if rank == 0 else {}
    parts = (_with_average(part, averages.get(part.name)) for part in engine.shards.parts())
    return part_of_rank(rank, parts, buffers, copy=copy)


def _with_average(part: ParameterPart, average: Tensor | None) -> ParameterPart:
    """Add the average of a part, which may be padded; a parameter that has always been frozen has none."""
    if average is None:
        return part
    return replace(part, tensors=part.tensors | {AVERAGE: average[: part.tensors[WEIGHT].numel()]})
