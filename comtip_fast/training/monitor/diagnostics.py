"""Diagnostics describe a run and never end it: an error in one is a warning and a missing number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger("comtip_fast")
_REPORTED: set[str] = set()


def diagnostic(what: str, compute: Callable[[], T], otherwise: T) -> T:
    """Return ``compute()``, or ``otherwise`` where it raises; the first error of each ``what`` is a warning.

    ``compute`` must make no collective call: a rank that left one early would keep the others waiting.

    Parameters
    ----------
    what
        Name of the diagnostic, for the warning.
    compute
        Computes or writes it.
    otherwise
        Stands in for the result after an error.
    """
    try:
        return compute()
    except Exception as error:  # any error: the guard against non-finite losses must be reached in every case
        if what not in _REPORTED:
            _REPORTED.add(what)
            log.warning("%s failed, training continues without it: %s: %s", what, type(error).__name__, error)
        return otherwise


def undefined(names: Iterable[str]) -> dict[str, float]:
    """Return NaN under every name: what a failed diagnostic logs."""
    return dict.fromkeys(names, float("nan"))
