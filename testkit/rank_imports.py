"""Import what ranks of a training run import; the fork server of :mod:`testkit.distributed` loads this module once."""

import deepspeed  # noqa: F401

import comtip_fast.cli.pretrain
import comtip_fast.plan.live
import comtip_fast.training.task
import comtip_fast.training.trainer  # noqa: F401
