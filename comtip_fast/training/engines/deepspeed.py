"""DeepSpeed ZeRO 0 to 3 behind the engine's seam; its config is derived from ours (:func:`deepspeed_config`).

What is ours stays ours: precision is autocast inside the forward pass, accumulation is by pieces whose negatives are those
of the global batch, and checkpoints are whole and know no engine, so a run can go on with another stage or number of ranks.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import cpp_extension

from comtip_fast.collectives import Group
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.distributed.comm_timer import clock_backend, clock_of
from comtip_fast.training.engines.base import StepModule, autocast_of, clip
from comtip_fast.training.optim import make_optimizer, optimizer_tensors, restore_optimizer
from comtip_fast.training.protocol import TrainingError

log = logging.getLogger("comtip_fast")

MOMENTS = ("exp_avg", "exp_avg_sq")
_FLOAT = 4


def deepspeed_config(config: RunConfig, world_size: int, gpu: bool) -> dict[str, Any]:
    """Return DeepSpeed's config; nobody writes one by hand.

    Parameters
    ----------
    config
        The run.
    world_size
        W.
    gpu
        Whether collectives run beside the work, on a stream of their own.
    """
    e = config.engine
    # In elements; DeepSpeed wants buckets of an even number.
    bucket, prefetch = (max(2, int(mb * 2**20 / _FLOAT) // 2 * 2) for mb in (e.bucket_mb, e.prefetch_mb))
    zero: dict[str, Any] = {"stage": e.zero_stage, "overlap_comm": gpu, "reduce_bucket_size": bucket}
    if e.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if e.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": prefetch,
            "stage3_param_persistence_threshold": e.persist_elements,
        }
    for key, where in (("offload_optimizer", e.offload_optimizer), ("offload_param", e.offload_param)):
        if where != "none":
            zero[key] = {"device": where, "pin_memory": gpu}
            if where == "nvme":
                zero[key]["nvme_path"] = e.nvme_path
    return {
        # Shares of a batch may be ragged and are cut outside of DeepSpeed, which only wants numbers that fit together.
        "train_micro_batch_size_per_gpu": max(1, config.data.batch_size // world_size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip if e.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class DeepSpeedEngine:
    """Optimizer state, gradients and parameters sharded over ranks as ``engine.zero_stage`` says."""

    def __init__(self, module: nn.Module, config: RunConfig, group: Group) -> None:
        self.config, self.group, self.stage = config, group, config.engine.zero_stage
        self.name = f"zero{self.stage}"
        # ZeRO 3 forgets the gradients of the step before with the first pass, and only those of parameters it reads.
        self.table_first = self.stage == 3
        device = next(module.parameters()).device
        self._deepspeed = _import(device)
        if not dist.is_initialized():  # one process alone; DeepSpeed wants a group all the same
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
            )
        os.environ.setdefault("LOCAL_RANK", "0")  # where no launcher set it, and DeepSpeed insists on it
        # ZeRO 3 takes a module's parameters away; the task keeps a module of its own, see :meth:`gathered_for_read`.
        self._home = module
        self.module = _moved(module) if self.stage == 3 else module
        self.optimizer = make_optimizer(self.module, config.optim)
        made = self._deepspeed.initialize(
            model=StepModule(self.module, autocast_of(config, device)),
            optimizer=self.optimizer,
            config=deepspeed_config(config, group.size, device.type == "cuda"),
            dist_init_required=False,
        )
        self._engine = made[0]
        clock_backend(self._deepspeed.comm.comm.cdb, clock_of(group, device))
        if self.stage:
            self._make_moments()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """See :meth:`.engine.Engine.call`."""
        return self._engine(function, *args)

    def start_step(self, rate: float) -> None:
        """See :meth:`.engine.Engine.start_step`; DeepSpeed forgets gradients when it steps."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        """See :meth:`.engine.Engine.piece`."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See :meth:`.engine.Engine.backward`; DeepSpeed averages, so the share is multiplied by the number of ranks."""
        # A loss that is not finite must not leave finite gradients, which DeepSpeed would apply.
        factor = self.group.size if math.isfinite(float(loss.detach())) else math.nan
        self._engine.backward(loss * factor)

    def update(self, finite: bool) -> float:
        """See :meth:`.engine.Engine.update`; ZeRO works out the norm, clips and refuses what is not finite by itself."""
        if self.stage == 0:
            norm = clip(self.module, self.config.optim.clip)
            if finite and math.isfinite(norm):
                self._engine.step()
            else:
                self._engine.zero_grad()
            return norm
        self._engine.step()
        return float(self._engine.optimizer._global_grad_norm)

    @contextmanager
    def summon_full_params(self) -> Iterator[None]:
        """See :meth:`.engine.Engine.summon_full_params`; every rank writes the same, rank 0's is taken."""
        if self.stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=0):
            yield

    @contextmanager
    def gathered_for_read(self) -> Iterator[None]:
        """Fill the task's own module on rank 0, one tensor at a time; outside of this its trained weights take no memory."""
        if self.stage < 3:
            yield
            return
        first, targets = self.group.rank == 0, dict(self._home.named_parameters())
        for name, parameter in self.module.named_parameters():
            with self._deepspeed.zero.GatheredParameters([parameter]):
                if first:
                    targets[name].data = parameter.detach().clone()
        if first:
            for target, source in zip(self._home.buffers(), self.module.buffers(), strict=True):
                target.copy_(source)
        try:
            yield
        finally:
            _empty(self._home)

    def optimizer_state(self) -> dict[str, Tensor]:
        """See :meth:`.engine.Engine.optimizer_state`; gathered one tensor at a time."""
        first = self.group.rank == 0
        if self.stage == 0:
            return optimizer_tensors(self.module, self.optimizer) if first else {}
        steps = self._steps()
        out: dict[str, Tensor] = {}
        for name, parameter in self._trained():
            for key in MOMENTS:
                value = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
                if first and value is not None:
                    out[f"{name}/{key}"] = value.detach().float().cpu().contiguous().clone()
            if first and steps is not None:
                out[f"{name}/step"] = torch.tensor(steps)
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See :meth:`.engine.Engine.restore`."""
        if self.stage == 0:
            restore_optimizer(self.module, self.optimizer, tensors)
            return
        for name, parameter in self._trained():
            for key in MOMENTS:
                if f"{name}/{key}" in tensors:
                    self._set_moment(parameter, key, tensors[f"{name}/{key}"].to(self._device()))
        steps = {float(v) for k, v in tensors.items() if k.endswith("/step")}
        if len(steps) > 1:
            raise TrainingError(f"the optimizer's steps differ from parameter to parameter ({sorted(steps)[:3]} ...)")
        for state in self.optimizer.state.values():
            for step in steps:
                state["step"] = torch.tensor(step)

    def _make_moments(self) -> None:
        """Give the optimizer its state now: DeepSpeed finds it only where it was there before the first group's step."""
        zero = self._engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for i, shard in enumerate(flat):
            # With NVMe a shard is a file, and comes into memory for as long as it is worked on.
            swapped = self.stage == 3 and zero._swappable_optimizer_subgroup(i)
            if swapped:
                zero._optimizer_states_and_gradient_swap_in(i)
            moments = {key: torch.zeros_like(shard, requires_grad=False) for key in MOMENTS}
            self.optimizer.state[shard].update(step=torch.tensor(0.0), **moments)
            if swapped:
                zero._optimizer_states_and_gradient_swap_out(i)
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        utils = self._deepspeed.utils
        if self.stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # ZeRO 3 pads a parameter to a multiple of the ranks; its own setter for whole tensors does not.
        length = utils.safe_get_local_optimizer_state(parameter, key).numel()
        padded = nn.functional.pad(value.flatten(), (0, length * self.group.size - value.numel()))
        utils.safe_set_local_optimizer_state(parameter, padded.split(length)[self.group.rank], key)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    def _steps(self) -> float | None:
        """Return how many steps the optimizer has made; the same for all parameters, because all get a gradient."""
        counts = [float(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return counts[0] if counts else None

    def _device(self) -> torch.device:
        return next(self._home.parameters()).device


def check_deepspeed(config: RunConfig, device: torch.device) -> None:
    """Refuse, before data are read, what would fail later; compile what NVMe offload needs.

    Raises
    ------
    TrainingError
        DeepSpeed is not there, or ``nvme`` is asked for without the folder or what asynchronous I/O takes.
    """
    deepspeed, e = _import(device), config.engine
    if "nvme" not in (e.offload_optimizer, e.offload_param):
        return
    try:
        Path(e.nvme_path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"engine.nvme_path={e.nvme_path}: {error.strerror}") from error
    builder = deepspeed.accelerator.get_accelerator().create_op_builder("AsyncIOBuilder")
    if not builder.is_compatible() or not cpp_extension.is_ninja_available():
        raise TrainingError(
            "engine.offload_*=nvme: DeepSpeed has to compile its async_io, which takes a C++ compiler, ninja, and libaio with "
            "its headers (package libaio-dev or libaio-devel; elsewhere, name them in CFLAGS and LDFLAGS). Install them, or "
            "use cpu"
        )
    folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    if not (folder / f"{builder.name}.so").exists() or (folder / "lock").exists():
        # Older PyTorch (its issue 189245) waits there for ever where a build was killed.
        log.info("DeepSpeed compiles %s, for some minutes; should it hang, delete %s", builder.name, folder / "lock")
    try:
        builder.load(verbose=False)
    except (RuntimeError, ImportError) as error:
        raise TrainingError(f"DeepSpeed's {builder.name}, for engine.offload_*=nvme: {error}") from error


def _moved(module: nn.Module) -> nn.Module:
    """Return a module with the trained weights of ``module``, which keeps none; copies of all else."""
    taken: dict[int, Any] = {id(q): nn.Parameter(q.data) for q in module.parameters() if q.requires_grad}
    moved = copy.deepcopy(module, taken)
    _empty(module)
    return moved


def _empty(module: nn.Module) -> None:
    """Let go of trained weights; frozen ones stay, because the loader reads a frozen stem between steps."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.new_empty(0)


def _import(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise TrainingError("engine.kind=deepspeed needs DeepSpeed: pip install 'comtip-fast[deepspeed]'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its use of names that PyTorch deprecates, said at every call.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Else it compiles an all-reduce that only its tensor-parallel layers call, for a minute and more.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
