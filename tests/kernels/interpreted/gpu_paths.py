"""Every path of ``bench/kernels/gpu.py`` once at tiny sizes: minutes, so tests/kernels/test_interpreted.py runs it nightly."""

import os
import sys
from pathlib import Path

import pytest

from bench.kernels import gpu

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

OPS = (
    "infonce",
    "infonce_block",
    "gene_sentence_embedding",
    "packed_attention",
    "one_query_attention",
    "table_pool",
    "level_cross_entropy",
    "pair_scores",
    "residual_norm",
    "bias_gelu",
    "image_attention",
)


def test_every_path_runs_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    out = tmp_path / "results.csv"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(out)])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    for op in OPS:
        last = [line.split()[-1] for line in lines if line.startswith(f"{op} ")]
        sizes = 2 if op in ("infonce", "packed_attention") else 1
        masked = 4 if op == "infonce" else 0
        last = [word for word in last if word in ("correct", "ran")]
        # The loss on equal columns has one more provider, two cross entropies.
        assert last == ["correct"] * (sizes + masked) + ["ran", "ran"] * sizes + ["ran"] * (op == "infonce")
    assert not out.exists()
