"""CoMTIP: a shared embedding space for histology tiles and the gene expression measured under them.

:func:`build_shards`, :func:`pretrain`, :func:`evaluate`, :func:`evaluate_tasks`, :func:`adapt` and :func:`load` are the Python
interface; ``comtip`` on the command line calls the same functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comtip_fast._version import __version__

__all__ = [
    "CountOptions",
    "GridOptions",
    "Model",
    "PoolingOptions",
    "SectionFacts",
    "__version__",
    "adapt",
    "build_shards",
    "evaluate",
    "evaluate_tasks",
    "load",
    "pretrain",
]

if TYPE_CHECKING:
    from comtip_fast.api import (
        CountOptions,
        GridOptions,
        Model,
        PoolingOptions,
        SectionFacts,
        adapt,
        build_shards,
        evaluate,
        evaluate_tasks,
        load,
        pretrain,
    )


def __getattr__(name: str) -> Any:
    """Return a name of the Python interface, imported on first use so that ``comtip --help`` does not import torch."""
    if name in __all__:
        from comtip_fast import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
