"""Engines, which run a training step: in one process, with DDP or with DeepSpeed ZeRO."""
