"""Communication volume of the contrastive loss per step, counted and compared with open_clip's method.

    python bench/train/traffic.py                    W = 2 and 4, 64 spots per rank, D = 512

The count covers the ``c10d`` operators of the forward and backward pass. Bytes of a collective are those one rank sends in
a ring algorithm: (W-1) n for an all-gather or reduce-scatter of n bytes per rank, 2 (W-1)/W n for an all-reduce of n bytes,
and the size of a point-to-point message. The baseline is open_clip's ``local_loss`` with ``gather_with_grad``: the features
of both modalities are gathered with gradients, and each rank computes its own rows of both directions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from comtip_fast.collectives import Group, counts_of, gather_rows
from comtip_fast.objectives import PairMetadata, global_infonce
from comtip_fast.training.distributed.process_group import init_distributed
from testkit.distributed import run_distributed

LIMIT = {"gather": 0.52, "ring": 0.77}


KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "send": "send",
}
"""Kind of collective by the name of its operator, in ``c10d`` and in ``_c10d_functional``."""


class Count(TorchDispatchMode):
    """Sum the bytes of every collective, also of those that a DTensor calls, by the operator's name."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # then the DTensor calls operators on its parts, which are counted
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            short, W = name.rstrip("_"), self.world
            if short in KINDS:
                # The smaller tensor of a gather or scatter belongs to one rank; the outputs of functional operators are new.
                factor = {"all_reduce": 2 * (W - 1) / W, "send": 1.0}.get(KINDS[short], W - 1.0)
                size = min(t.nbytes for t in _tensors(args)) / (W if short == "reduce_scatter_tensor" else 1)
                self.bytes[short] = self.bytes.get(short, 0.0) + factor * size
            elif short not in ("recv", "barrier", "wait_tensor", "_wrap_tensor_autograd"):
                raise NotImplementedError(f"no byte count is defined for the collective {func.name()}; add it here")
        return func(*args, **(kwargs or {}))

    def by_kind(self) -> dict[str, float]:
        """Return the bytes by kind of collective."""
        out: dict[str, float] = {}
        for short, size in self.bytes.items():
            out[KINDS[short]] = out.get(KINDS[short], 0.0) + size
        return out

    @property
    def total(self) -> float:
        """Total bytes."""
        return sum(self.bytes.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def open_clip_loss(image: Tensor, text: Tensor, scale: Tensor, group: Group, counts: list[int]) -> Tensor:
    """Return this rank's loss: its rows of both directions against the gathered features of the other modality."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    gathered = [gather_rows(v, group, counts) for v in (image, text)]
    labels = torch.arange(len(image)) + len(image) * group.rank
    logits = (scale * image @ gathered[1].T, scale * text @ gathered[0].T)
    return sum(F.cross_entropy(each, labels) for each in logits) / 2


def formula(form: str, b: int, D: int, W: int) -> float:
    """Return the bytes that one rank of W sends for its b spots, whose vectors have D fp32 values."""
    vectors, per_image = 4 * b * D * (W - 1), 4 * b * (W - 1)
    weights = 2 * (W - 1) / W * 4  # all-reduce of the summed weights
    if form == "gather":
        # Forward: vectors, 16 bytes of ids, the rows' maxima (all-reduced: twice) and sums; backward: log-sums, gradients.
        return 2 * vectors + per_image * (4 + 2 + 1 + 1) + weights
    # Forward: vectors, ids, statistics; backward: vectors with their log-sums, gradients.
    return 3 * vectors + per_image * (4 + 1 + 1) + weights


def rank(out: str, spots: int, width: int) -> None:
    """Count the bytes of every case as one rank; rank 0 writes the rows."""
    torch.set_num_threads(1)
    rows = []
    with init_distributed(120, "cpu") as group:
        counts = counts_of(spots * group.size, group.size)
        torch.manual_seed(group.rank)
        image, text = (torch.randn(spots, width, requires_grad=True) for _ in range(2))
        more = torch.randn(spots, width, requires_grad=True)
        scale, ids = torch.tensor(14.0, requires_grad=True), torch.arange(2 * spots) + 2 * spots * group.rank
        with Count(group.size) as peer:
            open_clip_loss(image, text, scale, group, counts).backward()
        for form in LIMIT:
            for columns in (spots, 2 * spots):
                texts = torch.cat([text, more])[:columns]
                pairs = PairMetadata(ids[:columns], torch.zeros(columns, dtype=torch.int64), torch.ones(spots))
                with Count(group.size) as ours:
                    global_infonce(image, texts, scale, pairs, group, counts, form).backward()
                rows.append(
                    {
                        "W": group.size,
                        "form": form,
                        "spots": spots,
                        "columns": columns,
                        "D": width,
                        "bytes": ours.total,
                        "formula": formula(form, spots, width, group.size),
                        "open_clip": peer.total,
                        "share": ours.total / peer.total,
                        "by": ours.bytes,
                    }
                )
        if group.rank == 0:
            Path(out).write_text(json.dumps(rows))


def run(worlds: list[int], spots: int, width: int) -> list[dict[str, Any]]:
    """Return the rows of every world size."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            out = Path(folder) / f"{world}.json"
            run_distributed([__file__, "--rank", str(out), "--spots", str(spots), "--width", str(width)], world)
            rows += json.loads(out.read_text())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks, comma-separated (default 2,4)")
    parser.add_argument("--spots", type=int, default=64, help="spots per rank (default 64)")
    parser.add_argument("--width", type=int, default=512, help="values of a vector (D) (default 512)")
    parser.add_argument("--rank", help="run as one rank (used internally)")
    args = parser.parse_args()
    if args.rank:
        rank(args.rank, args.spots, args.width)
        return
    rows = run([int(w) for w in args.worlds.split(",")], args.spots, args.width)
    print("| W | form | spots | columns | D | bytes per rank | formula | open_clip | share |")
    print("| - | - | - | - | - | - | - | - | - |")
    for r in rows:
        print(
            f"| {r['W']} | {r['form']} | {r['spots']} | {r['columns']} | {r['D']} | {r['bytes']:.0f} | "
            f"{r['formula']:.0f} | {r['open_clip']:.0f} | {r['share']:.3f} |"
        )
    sys.exit(not all(r["share"] <= LIMIT[r["form"]] and abs(r["bytes"] / r["formula"] - 1) <= 0.02 for r in rows))


if __name__ == "__main__":
    main()
