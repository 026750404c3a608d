"""CoMTIP, fast: one space for histology tiles and the gene expression measured under them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comtip_fast._version import __version__

__all__ = ["Model", "__version__", "load"]

if TYPE_CHECKING:
    from comtip_fast.api import Model, load


def __getattr__(name: str) -> Any:
    """Import the API on first use: ``comtip --help`` should not wait for torch."""
    if name in {"Model", "load"}:
        from comtip_fast import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
