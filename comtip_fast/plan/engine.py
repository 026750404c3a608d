"""How a run is spread over ranks, as the plan sees it: the engine's settings with everything resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from comtip_fast.config.schema import RunConfig
from comtip_fast.plan.cost import AUTOCAST, FP32, Precision

Kind = Literal["single", "ddp", "deepspeed"]
OffloadTarget = Literal["none", "cpu", "nvme"]
MEGABYTE = 1 << 20
ELEMENT = 4
"""Bytes of a parameter, of its gradient and of each moment: every engine keeps them in fp32 and computes under autocast."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Resolved settings; names are those of ``engine`` in the config."""

    kind: Kind = "single"
    zero_stage: int = 0
    """0 for anything but DeepSpeed."""
    bf16: bool = False
    loss_form: Literal["gather", "ring"] = "gather"
    shard_table: bool = False
    micro_batches: int = 1
    activation_checkpointing: bool = False
    offload_optimizer: OffloadTarget = "none"
    offload_param: OffloadTarget = "none"
    bucket_bytes: float = 25 * MEGABYTE

    @property
    def precision(self) -> Precision:
        """Bytes of an element in the model's forward and backward pass."""
        return AUTOCAST if self.bf16 else FP32

    def shares_table(self, sentences: int, ranks: int) -> bool:
        """Say whether ranks share the panel's sentences out; where there are fewer than ranks, every rank encodes all."""
        return self.shard_table and 1 < ranks <= sentences

    @property
    def has_masters(self) -> bool:
        """ZeRO 1 to 3 keep their shard of the parameters a second time, for the optimizer."""
        return self.zero_stage >= 1

    @property
    def name(self) -> str:
        """Say it in a word or two."""
        return (
            f"DeepSpeed ZeRO {self.zero_stage}"
            if self.kind == "deepspeed"
            else {"ddp": "DDP"}.get(self.kind, self.kind)
        )


def engine_of(config: RunConfig, ranks: int, gpu: bool) -> EngineSpec:
    """Resolve a config's ``engine`` and ``train.precision`` for so many ranks of a kind.

    Raises
    ------
    ValueError
        ``engine.kind: single`` on several devices.
    """
    e = config.engine
    if e.kind == "single" and ranks > 1:
        raise ValueError(f"engine.kind=single on {ranks} devices: use auto, ddp or deepspeed, or plan for one device")
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
        offload_optimizer=e.offload_optimizer,
        offload_param=e.offload_param,
        bucket_bytes=e.bucket_mb * MEGABYTE,
    )
