"""Random mutations of small sources of every format, to test the readers; see :mod:`testkit.source_fuzz.run`."""
