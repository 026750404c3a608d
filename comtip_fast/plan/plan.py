"""The plan of a run on a cluster: everything put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from comtip_fast.config.schema import RunConfig
from comtip_fast.plan.cost import Cost
from comtip_fast.plan.engine import EngineSpec, engine_of
from comtip_fast.plan.hardware import Cluster
from comtip_fast.plan.memory import MemoryRow, on_device, state_rows, work_rows
from comtip_fast.plan.parts import StepPart, Work, step_parts
from comtip_fast.plan.sizes import Inputs, Sizes, mean_panel, sizes_of
from comtip_fast.plan.timing import Timed, optimizer_cost, spend, time_collectives, time_parts
from comtip_fast.plan.traffic import Collective, step_traffic


@dataclass(frozen=True, kw_only=True)
class Loader:
    """What the step asks of storage and loader, and what they are said to give."""

    tiles_per_s: float
    """Per node, to keep up with the computation."""
    bytes_per_s: float
    """Of encoded tiles, per node."""
    given_tiles_per_s: float | None
    """What the loader is said to give per node; None: not said, so nothing is bound by it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predictions for one run on one cluster."""

    name: str
    cluster: Cluster
    engine: EngineSpec
    sizes: Sizes
    inputs: Inputs
    work: Work
    parts: tuple[StepPart, ...]
    memory: tuple[MemoryRow, ...]
    traffic: tuple[Collective, ...]
    times: tuple[Timed, ...]
    loader: Loader

    @property
    def step_seconds(self) -> float:
        """Seconds of one step."""
        return sum(t.seconds for t in self.times)

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
        """Tensors take at most 92 % of the device: the rest is for the context, the allocator and kernels' workspace."""
        return self.device_bytes <= FILL * self.cluster.device.memory

    @property
    def flops(self) -> float:
        """FLOPs of one rank and step, what is computed again included."""
        return sum(p.sum("flops") + p.sum("back_flops") for p in self.parts)

    @property
    def utilisation(self) -> float:
        """Share of the device's peak in the whole step."""
        peak = self.cluster.device.bf16 if self.engine.precision.is_bf16 else self.cluster.device.fp32
        return self.flops / self.step_seconds / peak


FILL = 0.92


def make_plan(
    config: RunConfig,
    cluster: Cluster,
    inputs: Inputs | None = None,
    *,
    engine: EngineSpec | None = None,
    sizes: Sizes | None = None,
    loader_tiles_per_s: float | None = None,
) -> Plan:
    """Predict a run.

    Parameters
    ----------
    config
        The run.
    cluster
        Where it is to run.
    inputs
        Facts of the data that the config does not hold.
    engine
        Another engine than the config's: to compare designs.
    sizes
        Where they are known already; else the model is built on the meta device.
    loader_tiles_per_s
        What the loader gives per node, where it was measured.

    Raises
    ------
    ValueError
        There are fewer spots in the batch than ranks.
    """
    given, W = inputs or Inputs(), cluster.ranks
    s = sizes or sizes_of(config, given)
    if s.B < W:
        raise ValueError(f"data.batch_size={s.B}: at least one spot for each of {W} ranks; raise it or take fewer")
    e = engine or engine_of(config, W, cluster.device.name != "cpu")
    w = work_of(s, e, cluster)
    parts = step_parts(s, w)
    traffic = step_traffic(s, e, W)
    computed = time_parts(parts, cluster, e.precision)
    times = [*computed, _optimizer_time(s, e, cluster), *time_collectives(traffic, cluster, _beside(parts, cluster, e))]
    tiles = s.B / cluster.nodes / sum(t.seconds for t in times)
    if loader_tiles_per_s is not None:
        missing = s.B / cluster.nodes / loader_tiles_per_s - sum(t.seconds for t in times)
        times.append(Timed("wait: loader", max(0.0, missing), "loader"))
    return Plan(
        name=config.name,
        cluster=cluster,
        engine=e,
        sizes=s,
        inputs=given,
        work=w,
        parts=tuple(parts),
        memory=(*state_rows(s, e, W), *work_rows(s, e, w, parts, W)),
        traffic=tuple(traffic),
        times=tuple(times),
        loader=Loader(tiles_per_s=tiles, bytes_per_s=tiles * s.tile_bytes, given_tiles_per_s=loader_tiles_per_s),
    )


def at_mean_panel(plan: Plan, config: RunConfig) -> Plan:
    """Return the plan of a step with the mean panel instead of the largest."""
    G = mean_panel(min(config.panel.min_genes, plan.sizes.G), plan.sizes.G)
    return make_plan(
        config,
        plan.cluster,
        plan.inputs,
        engine=plan.engine,
        sizes=plan.sizes.at_panel(G),
        loader_tiles_per_s=plan.loader.given_tiles_per_s,
    )


def work_of(s: Sizes, e: EngineSpec, c: Cluster) -> Work:
    """Return the busiest rank's share of a step."""
    own = ceil(s.B / c.ranks)
    rows = s.G * s.Q
    if e.shares_table(rows, c.ranks):
        rows = ceil(rows / c.ranks)
    mispaired = s.hard_columns and s.G >= 2 and s.has_nce
    return Work(
        spots=own,
        pieces=e.micro_batches,
        images=s.B,
        columns=2 * own if mispaired else own,
        table_rows=rows,
        precision=e.precision,
        gpu=c.device.name != "cpu",
        checkpointing=e.activation_checkpointing,
    )


def _optimizer_time(s: Sizes, e: EngineSpec, c: Cluster) -> Timed:
    elements = s.trained / (c.ranks if e.zero_stage else 1)
    cost: Cost = optimizer_cost(elements)
    spent = spend([cost], c, e.precision)
    return Timed("optimizer", spent.forward + spent.backward, spent.bound)


def _beside(parts: Sequence[StepPart], c: Cluster, e: EngineSpec) -> dict[str, float]:
    """Return the seconds of computation that messages can hide behind."""
    spent = {part.name: spend(part.costs, c, e.precision, part.times) for part in parts}
    beside = {"forward": sum(x.forward for x in spent.values()), "backward": sum(x.backward for x in spent.values())}
    if "InfoNCE" in spent:
        beside["InfoNCE"] = spent["InfoNCE"].forward + spent["InfoNCE"].backward
    return beside
