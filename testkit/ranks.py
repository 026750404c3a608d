"""Process group whose ranks are threads of this process, for tests of losses over several ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Ranks:
    """Run a function on every rank, one thread per rank.

    Only one thread runs at a time, until it waits for another rank, so that kernels can be interpreted.

    Parameters
    ----------
    size
        Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size, self.turn, self.posted = size, threading.Condition(), dict[tuple[int, int], Any]()

    def run(self, work: Callable[[Rank], Any]) -> list[Any]:
        """Call ``work`` on every rank and return the results in the order of the ranks."""
        out: dict[int, Any] = {}

        def one(rank: int) -> None:
            with self.turn:
                out[rank] = work(Rank(rank, self))

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert sorted(out) == list(range(self.size)), "a rank failed"
        return [out[rank] for rank in range(self.size)]


class Rank:
    """One rank; implements :class:`comtip_fast.collectives.Group`."""

    def __init__(self, rank: int, ranks: Ranks) -> None:
        self.rank, self.size, self._ranks, self._calls = rank, ranks.size, ranks, 0

    def _post(self, value: Any) -> int:
        self._ranks.posted[self._calls, self.rank] = value
        self._ranks.turn.notify_all()
        self._calls += 1
        return self._calls - 1

    def _fetch(self, call: int, rank: int) -> Any:
        assert self._ranks.turn.wait_for(lambda: (call, rank) in self._ranks.posted, timeout=60)
        return self._ranks.posted[call, rank]

    def _all(self, value: torch.Tensor) -> list[torch.Tensor]:
        call = self._post(value.clone())
        return [self._fetch(call, rank) for rank in range(self.size)]

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Return the rows of all ranks, concatenated (all-gather)."""
        return torch.cat(self._all(rows))

    def scatter_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Return this rank's part of the sum of ``rows`` over ranks (reduce-scatter); rank i gets ``counts[i]`` rows."""
        return torch.stack([part.split(list(counts))[self.rank] for part in self._all(rows)]).sum(0)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks (all-reduce)."""
        return torch.stack(self._all(values)).sum(0)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Return the element-wise maximum over ranks (all-reduce)."""
        return torch.stack(self._all(values)).amax(0)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Return per flag whether it is set on any rank (all-reduce)."""
        return self.max(torch.tensor(list(flags), dtype=torch.uint8)).bool().tolist()

    def ring_shift(self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Send tensors to the next rank; the returned function waits for those of the previous one and fills ``receive``."""
        call = self._post([t.clone() for t in send])

        def wait() -> None:
            for source, target in zip(self._fetch(call, (self.rank - 1) % self.size), receive, strict=True):
                target.copy_(source)

        return wait
