"""Run mutated sources through the commands: ``comtip shards build``, then ``comtip predict`` with a small model."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import matplotlib
import torch
from comtip_shards.errors import SourceError

from comtip_fast.cli import main
from comtip_fast.config.io import load_config
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.source_fuzz.corpus import Source
from testkit.source_fuzz.run import Through, facts_of
from testkit.tiny import tiny_shards

SMALL = [
    "data.batch_size=32",
    "data.views=2",
    "genes.per_cohort=30",
    "panel.max_genes=24",
    "levels.n_levels=5",
    "levels.min_positive=10",
    "vision.patch_px=16",
    "vision.width=32",
    "vision.depth=1",
    "vision.heads=2",
    "text.width=32",
    "text.depth=1",
    "text.heads=2",
    "text.max_tokens=6",
    "align.dim=32",
    "train.steps=2",
    "train.validate_every=0",
    "train.threads=1",
    "train.device=cpu",
]
REFUSED = (1, 2)
"""Exit codes of a refusal."""


def build_and_predict(folder: Path) -> Through:
    """Train a small model for two steps, and return a function that builds a set from a source and predicts on it.

    A slide without spots is only predicted on.
    The function raises SourceError with a command's output if the command refuses the source, and RuntimeError if it fails.
    """
    # Matplotlib makes these folders at its first use, which is no change by the source.
    matplotlib.get_configdir(), matplotlib.get_cachedir()
    config = load_config(None, [*SMALL, f"data.shards={tiny_shards(folder / 'tiny')}"])
    model = folder / "model"
    Trainer(build_task(config, torch.device("cpu")), config, model).fit()

    def through(path: Path, source: Source, out: Path) -> None:
        facts = facts_of(path, source)
        options = [part for key, value in facts.items() for part in (f"--{key.replace('_', '-')}", value)]
        section = f"{path}:{source.section}" if source.section else str(path)
        commands = [
            ["predict", str(model), section, "--genes", "ERBB2", "CD74", "--out", str(out / "p.h5ad"), *options]
        ]
        if source.fmt != "slide":
            build = ["shards", "build", str(path), "--out", str(out / "set"), "--tile-px", "32", *options]
            commands.insert(0, build)
        for command in commands:
            told = io.StringIO()
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
                code = main(command)
            text = told.getvalue()
            if code in REFUSED and "Traceback" not in text:
                raise SourceError(text)
            if code != 0:
                raise RuntimeError(f"exit code {code}: {text[-2000:]}")

    return through
