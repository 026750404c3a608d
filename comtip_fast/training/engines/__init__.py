"""Ways to run a step: one process, DDP or DeepSpeed ZeRO."""
