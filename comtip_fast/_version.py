"""The version of comtip-fast; this module has no imports."""

__version__ = "0.1.0"
