"""Typed settings: dataclasses (``schema``), reading and writing of config files (``io``)."""
