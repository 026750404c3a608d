"""Why models are not built under ``deepspeed.zero.Init``: which initial weights it changes, on one CPU rank.

    PYTHONPATH=.:kernels:data_shards python bench/scale/zero_init.py

``zero.Init`` divides each parameter over the ranks as soon as the constructor of its module returns, so that no rank holds the whole
model. An initialization that an outer module applies afterwards gets empty tensors. Weights are compared with those of a plain
construction from the same seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import timm
import torch
import torch.distributed as dist
from torch import nn

from comtip_fast.models.comtip import PairHead
from comtip_fast.training.distributed.deepspeed_internals import disable_shm_comm


def compare(name: str, make: Callable[[], nn.Module]) -> None:
    """Print one row: how many tensors differ, and the standard deviations of the first of them."""
    import deepspeed

    disable_shm_comm(deepspeed)  # compiled otherwise
    torch.manual_seed(0)
    plain = dict(make().named_parameters())
    torch.manual_seed(0)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    try:
        with deepspeed.zero.Init(config_dict_or_path=settings):
            module = make()
    except ValueError as error:
        print(f"| {name} | ends with: {error} | | |")
        return
    differ = []
    for key, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter.data, plain[key].data):
                differ.append((key, float(parameter.data.std()), float(plain[key].data.std())))
    first = differ[0] if differ else ("", 0.0, 0.0)
    print(f"| {name} | {len(differ)} of {len(plain)} | {first[0]} | {first[1]:.4f} instead of {first[2]:.4f} |")


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("| module | tensors that differ | first | standard deviation |\n|---|---|---|---|")
    compare("timm vit_tiny_patch16_224", lambda: timm.create_model("vit_tiny_patch16_224"))
    compare("CoMTIP's pair head", lambda: PairHead(32))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
