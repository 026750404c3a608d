"""DeepSpeed sends parameters as bytes, which the channels-last weights of a frozen stem do not allow."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from torch import nn
from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.training.engines.factory import make_engine

module = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4, 2))
module.to(memory_format=torch.channels_last)[:2].requires_grad_(False)
before = [p.clone() for p in module.parameters()]
make_engine(module, load_config(None, ["engine.kind=deepspeed", "engine.zero_stage=1", "train.device=cpu"]), SingleProcessGroup())
assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
assert module[1].weight.is_contiguous(memory_format=torch.channels_last)
print("built")
"""


def test_channels_last_weights_are_sent_and_keep_their_format():
    pytest.importorskip("deepspeed")
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=False, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("built\n")
