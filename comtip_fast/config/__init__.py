"""Settings of a run: typed dataclasses (``schema``), and reading and writing of config files (``io``)."""
