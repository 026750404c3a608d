"""Test support: synthetic sources, shard corruption, fault injection and multi-process launchers. Not in the wheel."""
