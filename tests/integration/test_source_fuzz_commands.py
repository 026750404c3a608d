"""Sources of the fuzz pass through ``shards build`` and ``predict``; the nightly run is ``python -m testkit.fuzz --through predict``."""

from __future__ import annotations

from pathlib import Path

import pytest

from testkit.source_fuzz.run import SourceFuzzer
from testkit.source_fuzz.through import build_and_predict

pytest.importorskip("tifffile")


@pytest.mark.filterwarnings("ignore")
def test_intact_sources_pass_through_build_and_predict(tmp_path: Path):
    fuzzer = SourceFuzzer(tmp_path, seed=0, limit_s=120, through=build_and_predict(tmp_path))
    outcomes = {name: fuzzer.intact_outcome(name) for name in ("slide", "slide pages", "stimage")}
    assert {name: o.detail for name, o in outcomes.items() if o.outcome != "reads"} == {}
