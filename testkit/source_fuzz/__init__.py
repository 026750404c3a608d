"""Mutate small sources of every format and check what the readers do with them; see :mod:`testkit.source_fuzz.run`."""
