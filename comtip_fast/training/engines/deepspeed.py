"""Engine for DeepSpeed ZeRO 0 to 3; DeepSpeed's config is derived from the run's config (:func:`deepspeed_config`).

Precision, gradient accumulation and checkpoints do not use DeepSpeed's own implementation: autocast runs inside the forward
pass, accumulation is gradient caching with the negatives of the global batch, and checkpoints hold full tensors or indexed
parts of them, so that a run can resume with another engine, ZeRO stage or number of ranks.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from comtip_fast.collectives import Group
from comtip_fast.config.schema import RunConfig
from comtip_fast.runtime import devices, torch_internals
from comtip_fast.training.distributed import deepspeed_internals as internals
from comtip_fast.training.distributed.comm_timer import clock_backend, clock_of
from comtip_fast.training.engines.base import Shards, StepModule, Update, autocast_of, clip, exceeds
from comtip_fast.training.engines.zero3_shards import Zero3Shards
from comtip_fast.training.optim import make_optimizer, mask_steps, optimizer_tensors, restore_optimizer, set_rate
from comtip_fast.training.protocol import MOMENTS, PartSource, TrainingError
from comtip_fast.training.update.ema import OwnWeights, exchanged, whole_weights
from comtip_fast.training.update.spikes import SpikeLimit

log = logging.getLogger("comtip_fast")

_FLOAT = 4


def deepspeed_config(config: RunConfig, world_size: int, gpu: bool) -> dict[str, Any]:
    """Return DeepSpeed's config for a run.

    Parameters
    ----------
    config
        Config of the run.
    world_size
        Number of ranks.
    gpu
        Whether the run is on GPUs, where collectives overlap with computation on their own stream.
    """
    e = config.engine
    # In elements; DeepSpeed requires an even number.
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
        # Batches are split outside of DeepSpeed, possibly unevenly; DeepSpeed only checks that these numbers are consistent.
        "train_micro_batch_size_per_gpu": max(1, config.data.batch_size // world_size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip if e.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class DeepSpeedEngine:
    """DeepSpeed ZeRO: shards optimizer state, gradients and parameters over ranks according to ``engine.zero_stage``.

    Raises
    ------
    TrainingError
        DeepSpeed cannot be imported.
    """

    def __init__(self, module: nn.Module, config: RunConfig, group: Group) -> None:
        self.config, self.group, self.stage = config, group, config.engine.zero_stage
        self.name = f"zero{self.stage}"
        # ZeRO 3 clears a parameter's old gradient in the first pass of a step, and only if that pass reads the parameter.
        self.table_first = self.stage == 3
        # DeepSpeed leaves hooks and attributes on the parameters that it has trained.
        self.rebuilds = False
        device = next(module.parameters()).device
        self._deepspeed = _import(device)
        if not dist.is_initialized():  # DeepSpeed requires a process group even for a single process
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
            )
        os.environ.setdefault("LOCAL_RANK", "0")  # required by DeepSpeed, also without a launcher
        # ZeRO 3 partitions the parameters of its module, so it gets a copy; see :meth:`gathered_for_read`.
        self._task_module = module
        self.module = _moved(module) if self.stage == 3 else module
        self._parameters = list(self.module.named_parameters())
        # Optimizer state that is offloaded is updated on the host.
        self._fused = not devices.reads_are_free(device) and config.engine.offload_optimizer == "none"
        self.optimizer = make_optimizer(self.module, config.optim, fused=self._fused)
        # Read before ZeRO replaces the parameters of each group by flat buffers.
        group_of = {id(p): i for i, g in enumerate(self.optimizer.param_groups) for p in g["params"]}
        self._group_of = {name: group_of[id(p)] for name, p in self._trained()}
        self.autocast = autocast_of(config, device)
        with _contiguous(self.module):
            initialized = self._deepspeed.initialize(
                model=StepModule(self.module, self.autocast),
                optimizer=self.optimizer,
                config=deepspeed_config(config, group.size, device.type == "cuda"),
                dist_init_required=False,
            )
        self._engine = initialized[0]
        clock_backend(internals.comm_backend(self._deepspeed), clock_of(group, device))
        if self.stage:
            internals.create_moments(
                self._engine.optimizer, self.stage, self.optimizer.state, MOMENTS, fused=self._fused
            )
        self.shards: Shards | None = None
        if self.stage == 3:
            self.shards = Zero3Shards(self.module, self._deepspeed.utils, group, self._steps_by_name)
        skips = bool(self.stage) and config.optim.spike.policy == "skip"
        self._norm_limit = internals.NormLimit(self._engine.optimizer, self.stage) if skips else None

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """See :meth:`.base.Engine.call`."""
        return self._engine(function, *args)

    def start_step(self, rate: float) -> None:
        """See :meth:`.base.Engine.start_step`; DeepSpeed clears gradients after its step."""
        set_rate(self._engine.optimizer, rate)

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        """See :meth:`.base.Engine.piece`."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See :meth:`.base.Engine.backward`; DeepSpeed averages, so the share is multiplied by the number of ranks."""
        # If the loss is not finite, make all gradients NaN: DeepSpeed would apply finite ones.
        factor = torch.full_like(loss.detach(), self.group.size).masked_fill(~loss.detach().isfinite(), math.nan)
        self._engine.backward(loss * factor)

    def update(self, finite: Tensor | bool, spikes: SpikeLimit | None = None) -> Update:
        """See :meth:`.base.Engine.update`; in stages 1 to 3, ZeRO computes the norm, clips, and skips non-finite updates."""
        if self.stage == 0:
            update = clip(self._parameters, self.config.optim.clip, finite, spikes)
            if self._fused:
                mask_steps(self.optimizer, update.good)
                self._engine.step()
            elif bool(update.good):
                self._engine.step()
            else:
                self._engine.zero_grad()
            return update
        if self._norm_limit is not None and spikes is not None:
            self._norm_limit.set(spikes.norm)
        elif spikes is not None:
            # A read on the host, where ZeRO's step reads the norm anyway.
            self._engine.optimizer.clip_grad = min(self.config.optim.clip or math.inf, float(spikes.norm))
        self._engine.step()
        like = finite if isinstance(finite, Tensor) else torch.zeros((), device=self._device())
        norm = internals.gradient_norm(self._engine.optimizer, like)
        if spikes is None:
            return Update(norm, norm.isfinite() & finite)
        if self._norm_limit is not None:
            norm = self._norm_limit.norm(norm)
        spike = exceeds(norm, spikes)
        good = norm.isfinite() & finite
        return Update(norm, good & ~spike if spikes.skip else good, spike=spike, limit=spikes.norm)

    def elementwise(self) -> AbstractContextManager[Any]:
        """See :meth:`.base.Engine.elementwise`."""
        if self.stage < 3:
            return nullcontext()
        if self.config.engine.offload_param != "none":
            # Parts are in host memory or in files: all ranks write the same values to whole weights, and rank 0's are kept.
            whole: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(
                list(self.module.parameters()), modifier_rank=0
            )
            return whole
        assert isinstance(self.shards, Zero3Shards)
        return self.shards.elementwise()

    def own_weights(self) -> Iterator[OwnWeights]:
        """See :meth:`.base.Engine.own_weights`; ZeRO 0 to 2 keep whole weights on every rank."""
        return self.shards.own_weights() if isinstance(self.shards, Zero3Shards) else whole_weights(self.module)

    @contextmanager
    def gathered_for_read(
        self,
        *,
        every_rank: bool = False,
        wanted: Callable[[str], bool] = lambda name: True,
        averages: Mapping[str, Tensor] | None = None,
    ) -> Iterator[None]:
        """See :meth:`.base.Engine.gathered_for_read`; ZeRO 3 gathers one tensor at a time into the task's module.

        With ZeRO 3, the trained weights of the task's module are empty outside of this context.
        """
        if not isinstance(self.shards, Zero3Shards):
            with exchanged(self.module, averages):
                yield
            return
        reads, targets = every_rank or self.group.rank == 0, dict(self._task_module.named_parameters())
        averages = averages or {}
        # The task's module keeps its frozen weights, one of which may have an average since it was trained.
        kept = {name: p.data for name, p in targets.items() if name in averages and not p.requires_grad}
        for name, parameter in self.module.named_parameters():
            if wanted(name):
                device = targets[name].device
                whole = self.shards.whole_average(parameter, averages[name].to(device)) if name in averages else None
                whole = self._whole_weight(parameter, reads) if whole is None else whole
                if reads:
                    targets[name].data = whole
        if reads:
            for target, source in zip(self._task_module.buffers(), self.module.buffers(), strict=True):
                target.copy_(source)
        try:
            yield
        finally:
            _empty(self._task_module)
            for name, data in kept.items():
                targets[name].data = data

    def _whole_weight(self, parameter: nn.Parameter, copied: bool) -> Tensor:
        """Gather a parameter, and return a copy of it if ``copied`` is set, otherwise an empty tensor; a collective call."""
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone() if copied else parameter.new_empty(0)

    def optimizer_state(self, *, every_rank: bool = False) -> dict[str, Tensor]:
        """See :meth:`.base.Engine.optimizer_state`; gathers one tensor at a time."""
        first = every_rank or self.group.rank == 0
        if self.stage == 0:
            return optimizer_tensors(self.module, self.optimizer) if first else {}
        steps = self._steps()
        out: dict[str, Tensor] = {}
        for name, parameter in self._trained():
            for key in MOMENTS:
                value = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
                if first and value is not None:
                    out[f"{name}/{key}"] = value.detach().float().cpu().contiguous().clone()
            if first and self._group_of[name] in steps:
                out[f"{name}/step"] = torch.tensor(steps[self._group_of[name]])
        return out

    def restore(self, source: PartSource) -> None:
        """See :meth:`.base.Engine.restore`."""
        if self.stage == 0:
            restore_optimizer(self.module, self.optimizer, source)
            return
        if isinstance(self.shards, Zero3Shards):
            self.shards.restore_moments(source)
        else:
            self._restore_moments(source)
        self._set_steps({name: source.step_of(name) for name in self._group_of})

    def close(self) -> None:
        """See :meth:`.base.Engine.close`."""
        self._engine.destroy()
        self.optimizer.state.clear()

    @torch.no_grad()
    def _restore_moments(self, source: PartSource) -> None:
        """Replace this rank's part of the moments under ZeRO 1 or 2; those that ``source`` lacks are not changed."""
        for name, parameter in self._trained():
            start, own = internals.own_moments(parameter, MOMENTS)
            for key in MOMENTS:
                length = own[key].numel() if own else 0
                value = source.read(name, key, start, start + length)
                if own and value is not None:
                    own[key].copy_(value)
                del value  # otherwise in memory while the next part is read

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the names and tensors of the trained parameters."""
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    def _states(self) -> list[tuple[int, dict[str, Tensor]]]:
        """Return the state of every flat buffer, with the index of its parameter group."""
        shards = internals.shards_of(self._engine.optimizer, self.stage)
        return [(group, self.optimizer.state[shard]) for group, shard in shards]

    def _steps(self) -> dict[int, float]:
        """Return the number of optimizer steps of each parameter group; all parameters of a group have a gradient in every step."""
        return {group: float(state["step"]) for group, state in self._states() if "step" in state}

    def _steps_by_name(self) -> dict[str, float]:
        """Return the number of optimizer steps of each trained parameter."""
        steps = self._steps()
        return {name: steps[group] for name, group in self._group_of.items() if group in steps}

    def _set_steps(self, by_name: dict[str, float]) -> None:
        """Set the number of optimizer steps of each parameter (0 if it was frozen so far); raise if they differ in a group."""
        for index, state in self._states():
            names = [name for name, group in self._group_of.items() if group == index]
            steps = {by_name[name] for name in names}
            if len(steps) > 1:
                raise TrainingError(
                    f"optimizer state of the checkpoint: step counts differ ({sorted(steps)[:3]}) among parameters that ZeRO updates "
                    f"together, e.g. {names[0]}; to thaw parameters at this step, keep their names in optim.freeze and give the step of "
                    "the checkpoint as the last frozen one; otherwise resume with engine.kind=auto, or with the earlier value of "
                    "optim.freeze"
                )
            for step in steps:
                state["step"] = torch.tensor(step, device=state["step"].device)

    def _device(self) -> torch.device:
        return next(self._task_module.parameters()).device


def check_deepspeed(config: RunConfig, device: torch.device) -> None:
    """Check the requirements of DeepSpeed before any data is read, and compile its extension for NVMe offload.

    Raises
    ------
    TrainingError
        DeepSpeed cannot be imported or, for ``nvme``, the folder cannot be created or the extension cannot be compiled.
    """
    deepspeed, e = _import(device), config.engine
    if "nvme" not in (e.offload_optimizer, e.offload_param):
        return
    try:
        Path(e.nvme_path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"engine.nvme_path={e.nvme_path}: cannot create this folder ({error.strerror}); give a path that can be written"
        ) from error
    from torch.utils import cpp_extension  # the import warns on a machine with the CUDA toolkit and no GPU

    builder = deepspeed.accelerator.get_accelerator().create_op_builder("AsyncIOBuilder")
    if not builder.is_compatible() or not cpp_extension.is_ninja_available():
        raise TrainingError(
            "offloading to nvme: DeepSpeed must compile its async_io extension, but the C++ compiler, ninja, or libaio with "
            "headers is missing; install them (libaio: package libaio-dev or libaio-devel; for another prefix set CFLAGS and "
            "LDFLAGS), or set engine.offload_optimizer and engine.offload_param to cpu"
        )
    folder = torch_internals.build_folder(builder.name)
    if not (folder / f"{builder.name}.so").exists() or (folder / "lock").exists():
        # Older PyTorch waits forever for the lock of a killed build (PyTorch issue 189245).
        log.info(
            "DeepSpeed compiles %s (a few minutes); if this hangs, delete %s",
            builder.name,
            folder / "lock",
        )
    try:
        builder.load(verbose=False)
    except (RuntimeError, ImportError) as error:
        raise TrainingError(
            f"offloading to nvme: cannot build DeepSpeed's {builder.name}: {error}; fix the build, or set "
            "engine.offload_optimizer and engine.offload_param to cpu"
        ) from error


@contextmanager
def _contiguous(module: nn.Module) -> Iterator[None]:
    """Make parameters contiguous inside the block: DeepSpeed sends them as bytes, which the channels-last weights of a stem do not allow.

    Their format is restored afterwards, unless ZeRO 3 has partitioned them.
    """
    # Weights of 1 x 1 convolutions are contiguous in both formats, with other strides.
    others = [p for p in module.parameters() if p.ndim and p.stride(-1) != 1]
    for p in others:
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    yield
    for p in others:
        if p.ndim == 4 and not p.requires_grad:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def _moved(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` that takes over its trained weights, which become empty in ``module``."""
    taken: dict[int, Any] = {id(q): nn.Parameter(q.data) for q in module.parameters() if q.requires_grad}
    moved = copy.deepcopy(module, taken)
    _empty(module)
    return moved


def _empty(module: nn.Module) -> None:
    """Free the trained weights of a module; frozen weights stay, because the loader uses a frozen stem between steps."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.new_empty(0)


def _import(device: torch.device) -> ModuleType:
    """Import DeepSpeed without its log lines and warnings; raise TrainingError if it cannot be imported."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise TrainingError(
            f"engine.kind=deepspeed: DeepSpeed cannot be imported ({error}); run pip install 'comtip-fast[deepspeed]', or set "
            "engine.kind=auto"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed uses deprecated names of PyTorch, which would warn at every call.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        internals.disable_shm_comm(deepspeed)  # used by tensor parallelism only, and slow to compile
    return deepspeed
