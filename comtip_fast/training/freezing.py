"""Parameters that are frozen for the whole run or up to a step (``optim.freeze``).

A frozen parameter has ``requires_grad=False`` when the engine is built. It therefore has no gradient and no optimizer state, and
is in no bucket of DDP or ZeRO. When a parameter thaws, the trainer builds the engine again.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from comtip_fast.training.protocol import TrainingError

Rules = Sequence[tuple[str, int]]


class Freezing:
    """The freezing schedule of a module.

    Parameters
    ----------
    module
        Module with its initial ``requires_grad``; parameters that the model freezes stay frozen.
    rules
        Pairs of a pattern for names of parameters or modules, and the last step in which these parameters are frozen; 0 freezes
        them for all steps.

    Raises
    ------
    TrainingError
        A pattern matches no trainable parameter, or all trainable parameters are frozen at step 1.
    """

    def __init__(self, module: nn.Module, rules: Rules) -> None:
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        _check(names, [name for name, _ in module.named_parameters()], rules)
        self._until = last_frozen_steps(names, rules)
        self._applied: set[str] | None = None
        first = self.frozen_at(1)
        if len(first) == len(names):
            raise TrainingError(
                f"optim.freeze: all {len(names)} trainable parameters are frozen at step 1; remove a pattern, so that at least one "
                "parameter is trained"
            )

    def frozen_at(self, step: int) -> set[str]:
        """Return the names of the parameters that the rules freeze in ``step`` (from 1)."""
        return {name for name, last in self._until.items() if last == 0 or step <= last}

    def changes_at(self, step: int) -> bool:
        """Return whether the frozen parameters of ``step`` differ from those of the last :meth:`apply`; False before the first."""
        return self._applied is not None and self.frozen_at(step) != self._applied

    def apply(self, module: nn.Module, step: int) -> None:
        """Set ``requires_grad`` of the parameters that the rules name to its value in ``step``."""
        self._applied = self.frozen_at(step)
        for name, parameter in module.named_parameters():
            if name in self._until:
                parameter.requires_grad_(name not in self._applied)


def last_frozen_steps(names: Sequence[str], rules: Rules) -> dict[str, int]:
    """Return the last frozen step of every parameter that a rule names; 0 means all steps. Of several rules, the latest step counts."""
    until: dict[str, int] = {}
    for pattern, last in rules:
        for name in _matches(names, pattern):
            before = until.get(name, last)
            until[name] = 0 if 0 in (before, last) else max(before, last)
    return until


def _matches(names: Sequence[str], pattern: str) -> list[str]:
    """Return the parameter names that match a pattern, or that belong to a module whose name matches."""
    return [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]


def _check(names: Sequence[str], every: Sequence[str], rules: Rules) -> None:
    """Raise TrainingError for a rule that matches none of the trainable parameters ``names``; ``every`` has all parameters."""
    for pattern, _ in rules:
        if not _matches(names, pattern):
            if _matches(every, pattern):
                raise TrainingError(
                    f"optim.freeze: {pattern!r} names only parameters that this model never trains; remove it"
                )
            levels = {".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 2)}
            near = difflib.get_close_matches(pattern, sorted(levels), n=3, cutoff=0.0)
            raise TrainingError(
                f"optim.freeze: {pattern!r} names no trainable parameter of the model; correct the name: similar names are "
                f"{', '.join(near)}"
            )
