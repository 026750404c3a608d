"""Changed checkpoints in parts: a resume falls back to an older one or refuses by file and fix; what was changed is never loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.io import config_to_dict
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.content import MAX_TEXT_BYTES, CheckpointError
from comtip_fast.training.checkpoint.parts.reader import ShardReader
from comtip_fast.training.checkpoint.parts.writer import index_of, part_of_rank, write_part
from comtip_fast.training.checkpoint.resume import find_checkpoint
from comtip_fast.training.checkpoint.run_state import RunState, random_state
from comtip_fast.training.engines.base import ParameterPart
from comtip_fast.training.protocol import TrainingError
from tests.comtip_fast.trainer_standin import config_of

CPU, FINGERPRINT = torch.device("cpu"), {"shards": "abc"}
PARTS, INDEX, STATE, SUMS = (
    ("part_00000.safetensors", "part_00001.safetensors"),
    "shards.json",
    "state.json",
    "SHA256SUMS",
)
OLD, NEW, FOREIGN = 5, 10, 7


def write(root: Path, step: int) -> Path:
    """Write a checkpoint of two equal parts, whose values tell its step."""
    folder = root / checkpoints.new_parts_folder(root, step)
    written = []
    for rank in range(2):
        own = torch.arange(4.0) + 4 * rank + 100 * step
        tensors = {key: own.clone() for key in ("weight", "exp_avg", "exp_avg_sq", "average")}
        parts = [ParameterPart("a", (8,), 4 * rank, tensors, float(step))]
        written.append(write_part(folder, part_of_rank(rank, parts, {}, copy=True)))
    state = RunState(step=step, validated=step).as_plain() | random_state(CPU)
    state |= {"config": config_to_dict(config_of()), "fingerprint": FINGERPRINT}
    return checkpoints.publish_parts(root, step, folder, index_of(written), state)


def resume(run: Path) -> tuple[int, list[float]]:
    """Return step and weights with which a run resumes, read as ZeRO 3 does."""
    group = SingleProcessGroup()
    found = find_checkpoint(run, config_of(), FINGERPRINT, group, CPU, resume=True, in_parts=True, pause=nullcontext)
    assert found is not None
    assert found.in_parts
    with ShardReader(found.folder) as reader:
        values = [reader.read("a", key, 0, 8) for key in ("weight", "exp_avg", "average")]
    lists = [[] if value is None else value.tolist() for value in values]
    assert lists[0] == lists[1] == lists[2]
    return found.step, lists[0]


def weights_of(step: int) -> list[float]:
    return (torch.arange(8.0) + 100 * step).tolist()


# -- changes of one checkpoint: the folder that is changed, and a foreign checkpoint -------------------------

Change = Callable[[Path, Path], object]


def rehash(folder: Path, _: Path) -> None:
    """State the hashes of what the folder now holds, as somebody who edits a checkpoint would."""
    names = [*PARTS, INDEX, STATE]
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / SUMS).write_text("".join(lines))


def everywhere(folder: Path, other: Path) -> None:
    """State hashes and sizes also in the index."""
    index = json.loads((folder / INDEX).read_text())
    for entry in index["files"]:
        data = (folder / entry["name"]).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / INDEX).write_text(json.dumps(index))
    rehash(folder, other)


def data(name: str, change: Callable[[bytes], bytes]) -> Change:
    def act(folder: Path, _: Path) -> None:
        content = change((folder / name).read_bytes())
        (folder / name).unlink()  # not through a hard link
        (folder / name).write_bytes(content)

    return act


def keys(name: str, **values: object) -> Change:
    return data(name, lambda raw: json.dumps(json.loads(raw) | values).encode())


def swap(folder: Path, _: Path) -> None:
    first, second = (folder / name for name in PARTS)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def foreign(*names: str) -> Change:
    return lambda folder, other: [shutil.copy(other / name, folder / name) for name in names]


def replaced(name: str, by: Callable[[Path, Path], object]) -> Change:
    def act(folder: Path, other: Path) -> None:
        (folder / name).unlink()
        by(folder / name, other / name)

    return act


def then(*steps: Change) -> Change:
    def act(folder: Path, other: Path) -> None:
        for step in steps:
            step(folder, other)

    return act


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def act(folder: Path, _: Path) -> None:
        found = load_file(folder / PARTS[1])
        change(found)
        save_file(found, folder / PARTS[1])

    return act


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)


def of_another_step(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def linked_folder(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(other)


@dataclass(frozen=True)
class Case:
    """A change, the text of the message, and whether the older checkpoint is used (otherwise the run refuses)."""

    change: Change
    message: str
    back: bool = True


FIRST, SECOND = PARTS
CASES = {
    "a part cut": Case(data(SECOND, lambda raw: raw[:-5]), rf"{SECOND}: .*bytes, but the index states"),
    "a part emptied": Case(data(FIRST, lambda raw: b""), rf"{FIRST}: 0 bytes"),
    "a part longer": Case(data(FIRST, lambda raw: raw + b"\0"), rf"{FIRST}: .*bytes, but the index states"),
    "a bit of the other part": Case(data(FIRST, lambda raw: raw[:-1] + b"\xff"), rf"{FIRST}: the SHA-256 differs"),
    "a bit of a part, with hashes": Case(
        then(data(SECOND, lambda raw: raw[:-1] + b"\xff"), rehash),
        rf"{SECOND}: {INDEX} and {SUMS} state different hashes",
    ),
    "a bit of a part": Case(data(SECOND, lambda raw: raw[:-1] + b"\xff"), rf"{SECOND}: the SHA-256 differs"),
    "a value of an average": Case(tensors(lambda t: t["average/a"][0].add_(1)), rf"{SECOND}: the SHA-256 differs"),
    "parts swapped": Case(swap, rf"{FIRST}: the SHA-256 differs"),
    "parts swapped, with hashes": Case(then(swap, rehash), rf"{FIRST}: {INDEX} and {SUMS} state different hashes"),
    "a part of another step": Case(foreign(SECOND), rf"{SECOND}: the SHA-256 differs"),
    "a part of another step, with hashes": Case(then(foreign(SECOND), rehash), rf"{SECOND}: {INDEX} and {SUMS}"),
    "the index of another step": Case(foreign(INDEX), rf"{INDEX}: the SHA-256 differs"),
    "the index of another step, with hashes": Case(then(foreign(INDEX), rehash), rf"{FIRST}: {INDEX} and {SUMS}"),
    "the state of another step": Case(foreign(STATE), rf"{STATE}: the SHA-256 differs"),
    "the state of another step, with hashes": Case(
        then(foreign(STATE), rehash), rf"{STATE}: step 7.* do not fit the folder of step 10", back=False
    ),
    "hashes of another step": Case(foreign(SUMS), rf"{INDEX}: the SHA-256 differs"),
    "a foreign hash": Case(
        data(SUMS, lambda raw: b"0" * 64 + raw[64:]), rf"{FIRST}: {INDEX} and {SUMS} state different"
    ),
    "hashes removed": Case(data(SUMS, lambda raw: b""), r"SHA256SUMS: no SHA-256 of"),
    "hashes without end": Case(replaced(SUMS, lambda path, _: huge(path)), rf"{SUMS}: more than .* bytes"),
    "a state without end, with hashes": Case(
        then(replaced(STATE, lambda path, _: huge(path)), rehash), rf"{STATE}: more than .* bytes"
    ),
    "metadata edited": Case(keys(STATE, position=3), rf"{STATE}: the SHA-256 differs"),
    "metadata of nonsense, with hashes": Case(then(keys(STATE, epoch=-3), rehash), rf"{STATE}: epoch: ", back=False),
    "another config, with hashes": Case(
        then(keys(STATE, config={"data": {"batch_size": 3}}), rehash),
        r"cannot resume, the config has changed",
        back=False,
    ),
    "other data, with hashes": Case(
        then(keys(STATE, fingerprint={"shards": "x"}), rehash), r"cannot resume, the input data has changed", back=False
    ),
    "more ranks, with hashes": Case(
        then(keys(INDEX, world_size=3), rehash), rf"{INDEX}: files are not those of 3 ranks"
    ),
    "a part removed": Case(lambda folder, _: (folder / SECOND).unlink(), rf"{SECOND}: missing"),
    "the index removed": Case(lambda folder, _: (folder / INDEX).unlink(), rf"{INDEX}: missing"),
    "the state removed": Case(lambda folder, _: (folder / STATE).unlink(), rf"{STATE}: missing"),
    "the hashes removed": Case(lambda folder, _: (folder / SUMS).unlink(), rf"{SUMS}: missing"),
    "a part that is a pipe": Case(replaced(FIRST, lambda path, _: os.mkfifo(path)), rf"{FIRST}: not a regular file"),
    "an index that is a pipe": Case(replaced(INDEX, lambda path, _: os.mkfifo(path)), rf"{INDEX}: not a regular file"),
    "hashes that are a pipe": Case(replaced(SUMS, lambda path, _: os.mkfifo(path)), rf"{SUMS}: not a regular file"),
    "a part that is a folder": Case(replaced(FIRST, lambda path, _: path.mkdir()), rf"{FIRST}: not a regular file"),
    "a part that is a device": Case(
        replaced(FIRST, lambda path, _: path.symlink_to("/dev/zero")), rf"{FIRST}: not a regular file"
    ),
    "a link to nothing": Case(
        replaced(SECOND, lambda path, _: path.symlink_to("gone")), rf"{SECOND}: a link to nothing"
    ),
    "a link to itself": Case(replaced(SECOND, lambda path, _: path.symlink_to(path)), rf"{SECOND}: a link to nothing"),
    "a link to another step": Case(replaced(SECOND, lambda path, to: path.symlink_to(to)), rf"{SECOND}: the SHA-256"),
    "a hard link to another step": Case(replaced(SECOND, lambda path, to: path.hardlink_to(to)), rf"{SECOND}: the SHA"),
    "a copy of another step": Case(of_another_step, rf"{STATE}: step 7.* do not fit the folder of step 10", back=False),
    "a link to the folder of another step": Case(linked_folder, rf"{STATE}: step 7.* do not fit", back=False),
    "a header without end, with all hashes": Case(
        then(data(SECOND, lambda raw: struct.pack("<Q", 1 << 60) + raw[8:]), everywhere),
        rf"{SECOND}: not safetensors",
    ),
    "a tensor less, with all hashes": Case(
        then(tensors(lambda t: (t.pop("exp_avg/a"), t.update(x=torch.ones(4)))), everywhere),
        rf"{SECOND}: no tensor",
    ),
    "an average less, with all hashes": Case(
        then(tensors(lambda t: (t.pop("average/a"), t.update(x=torch.ones(4)))), everywhere),
        rf"{SECOND}: no tensor 'average/a'",
    ),
    "a tensor of another type, with all hashes": Case(
        then(tensors(lambda t: t.update({"weight/a": t["weight/a"].double()})), everywhere),
        rf"{SECOND}: weight/a is F64",
    ),
    "a tensor of another shape, with all hashes": Case(
        then(tensors(lambda t: t.update({"weight/a": torch.ones(5)})), everywhere),
        rf"{SECOND}: weight/a is F32 \[5\]",
    ),
    "a value that is not finite, with all hashes": Case(
        then(tensors(lambda t: t["weight/a"].fill_(float("inf"))), everywhere),
        rf"{SECOND}: weight/a holds values",
        back=False,
    ),
    "an average that is not finite, with all hashes": Case(
        then(tensors(lambda t: t["average/a"].fill_(float("nan"))), everywhere),
        rf"{SECOND}: average/a holds values",
        back=False,
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    for step in (OLD, FOREIGN, NEW):
        write(root, step)
    return root


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    root = tmp_path / "run" / "checkpoints"
    for step in (OLD, NEW):
        shutil.copytree(checkpoints.folder_of(written, step), checkpoints.folder_of(root, step))
    shutil.copytree(checkpoints.folder_of(written, FOREIGN), tmp_path / "foreign")
    return tmp_path / "run"


@pytest.mark.parametrize("name", CASES)
def test_a_changed_checkpoint_is_never_loaded(
    run: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    case, folder = CASES[name], checkpoints.folder_of(run / "checkpoints", NEW)
    case.change(folder, tmp_path / "foreign")
    if case.back:
        assert resume(run) == (OLD, weights_of(OLD))
        caplog_has(caplog, rf"skipped a damaged checkpoint: .*step_{NEW:08d}/{case.message}")
        assert (run / "checkpoints" / f"damaged_step_{NEW:08d}").exists()
        return
    with pytest.raises((CheckpointError, TrainingError), match=case.message) as caught:
        resume(run)
    assert "; " in str(caught.value)  # the fix
    assert checkpoints.steps_of(run / "checkpoints") == [OLD, NEW]  # nothing was deleted or renamed


def caplog_has(caplog: pytest.LogCaptureFixture, pattern: str) -> None:
    assert any(re.search(pattern, record.getMessage()) for record in caplog.records), caplog.text


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.back])
def test_a_changed_checkpoint_without_an_older_one_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    root = run / "checkpoints"
    shutil.rmtree(checkpoints.folder_of(root, OLD))
    CASES[name].change(checkpoints.folder_of(root, NEW), tmp_path / "foreign")
    with pytest.raises(
        TrainingError, match=r"can be read \(see the warnings above\); delete the folder to start from step 0"
    ):
        resume(run)


def test_unchanged_and_moved_checkpoints_resume(run: Path, tmp_path: Path) -> None:
    root = run / "checkpoints"
    assert resume(run) == (NEW, weights_of(NEW))
    # Files and folders that a user has moved elsewhere and linked have the same content.
    part = checkpoints.folder_of(root, NEW) / SECOND
    part.rename(tmp_path / "moved")
    part.symlink_to(tmp_path / "moved")
    old = checkpoints.folder_of(root, OLD)
    old.rename(tmp_path / "old")
    old.symlink_to(tmp_path / "old")
    for name in ("step_²", "step_1", "step_00000012x", "damaged_step_00000013"):
        (root / name).mkdir()
    assert resume(run) == (NEW, weights_of(NEW))
    checkpoints.prune(root, 1, None)
    assert checkpoints.steps_of(root) == [NEW]
    assert (tmp_path / "old" / SUMS).is_file()  # only the link was deleted


def test_a_rank_that_does_not_see_the_checkpoint_of_rank_zero_says_so(tmp_path: Path):
    """It does not wait for tensors that rank 0, which found a checkpoint in parts, will not send."""
    with pytest.raises(CheckpointError, match=r"step_00000010/shards\.json: missing"):
        ShardReader(checkpoints.folder_of(tmp_path, NEW))
