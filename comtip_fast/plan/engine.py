"""Engine settings of a run with every default resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from comtip_fast.config.schema import RunConfig
from comtip_fast.plan.cost import AUTOCAST, FP32, Precision

Kind = Literal["single", "ddp", "deepspeed"]
OffloadTarget = Literal["none", "cpu", "nvme"]
MEGABYTE = 1 << 20
ELEMENT = 4
"""Bytes of a parameter, a gradient and an optimizer moment: all engines store them in fp32 and compute under autocast."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Resolved settings of ``engine``, the precision, and whether weights are averaged."""

    kind: Kind = "single"
    zero_stage: int = 0
    """0 without DeepSpeed."""
    bf16: bool = False
    loss_form: Literal["gather", "ring"] = "gather"
    shard_table: bool = False
    micro_batches: int = 1
    activation_checkpointing: bool = False
    offload_optimizer: OffloadTarget = "none"
    offload_param: OffloadTarget = "none"
    bucket_bytes: float = 25 * MEGABYTE
    compiled: bool = False
    """Whether blocks are compiled (``engine.compile``), so that the host issues fewer operators than are counted."""
    fused_blocks: bool = False
    """Whether blocks may be fused (``engine.fused_blocks`` on a GPU)."""
    ema: bool = False
    """Whether weights are averaged (``optim.ema``): every rank holds the average of the trained weights that it holds."""

    @property
    def precision(self) -> Precision:
        """Bytes of an element in the model's forward and backward pass."""
        return AUTOCAST if self.bf16 else FP32

    @property
    def fused(self) -> bool:
        """Whether blocks are fused: not if parameters are sharded."""
        return self.fused_blocks and self.zero_stage < 3

    def shares_table(self, sentences: int, ranks: int) -> bool:
        """Return whether the sentence table is sharded; it is not with one rank or with fewer sentences than ranks."""
        return self.shard_table and 1 < ranks <= sentences

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer has its own copy of the parameter shard (ZeRO 1 to 3)."""
        return self.zero_stage >= 1

    @property
    def name(self) -> str:
        """Name of the engine for reports."""
        return (
            f"DeepSpeed ZeRO {self.zero_stage}"
            if self.kind == "deepspeed"
            else {"ddp": "DDP"}.get(self.kind, self.kind)
        )


def engine_of(config: RunConfig, ranks: int, gpu: bool) -> EngineSpec:
    """Resolve ``engine`` and ``train.precision`` of a config for a number of ranks, on GPUs or CPUs.

    Raises
    ------
    ValueError
        ``engine.kind`` is ``single`` and there are several devices.
    """
    e = config.engine
    if e.kind == "single" and ranks > 1:
        raise ValueError(
            f"engine.kind=single on {ranks} devices: set engine.kind to auto, ddp or deepspeed, or plan for one device"
        )
    kind: Kind = e.kind if e.kind != "auto" else "single" if ranks == 1 else "ddp"
    bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and gpu)
    return EngineSpec(
        kind=kind,
        zero_stage=e.zero_stage if kind == "deepspeed" else 0,
        bf16=bf16,
        loss_form=e.loss_form,
        shard_table=e.shard_table,
        micro_batches=e.micro_batches,
        activation_checkpointing=e.activation_checkpointing,
        compiled=e.compile,
        fused_blocks=e.fused_blocks and gpu,
        offload_optimizer=e.offload_optimizer,
        offload_param=e.offload_param,
        bucket_bytes=e.bucket_mb * MEGABYTE,
        ema=config.optim.ema is not None,
    )
