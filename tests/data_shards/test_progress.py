"""Progress without a terminal, as in a batch job: lines in the log."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from comtip_shards import progress
from comtip_shards.builder.build import build_shards
from comtip_shards.qc.run import check_sources
from comtip_shards.reader.verify import verify
from comtip_shards.sources import open_source

from testkit.tiny import TinySection, write_tiny_source

SIZE = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0, "max_records": 20}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    return caplog


def test_progress_is_logged_with_the_time_left(log: pytest.LogCaptureFixture):
    with progress.Progress("slide: encoding", 100, unit="tile", show=True, done=20) as bar:
        time.sleep(0.01)
        bar.update(40)
    assert "slide: encoding: resuming, 20 of 100 tiles are complete" in log.text
    assert "slide: encoding: 60 of 100 tiles, 0.0 min left" in log.text


def test_progress_is_silent_if_it_is_not_shown(log: pytest.LogCaptureFixture):
    with progress.Progress("slide: encoding", 100, unit="tile", show=False) as bar:
        bar.update(40)
    assert not log.text


def test_builds_checks_and_verification_log_their_progress(tmp_path: Path, log: pytest.LogCaptureFixture):
    write_tiny_source(tmp_path / "source", [TinySection("a", "p", "train"), TinySection("b", "q", "val")])
    sources = open_source(tmp_path / "source")
    build_shards(sources, tmp_path / "set", **SIZE, progress=True)
    assert "reading sections: 1 of 2 sections, " in log.text
    verify(tmp_path / "set", progress=True)
    assert "verify: 1 of " in log.text
    check_sources(sources, tmp_path / "report", progress=True)
    assert "checks: 1 of 2 sections, " in log.text
