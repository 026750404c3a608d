"""Exports are self-contained, and refused if they are damaged or edited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from comtip_shards import ShardSet
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from comtip_fast.cli import main
from comtip_fast.config.io import load_config
from comtip_fast.evaluation.trained.encoder import initial_encoder
from comtip_fast.export import Bundle
from comtip_fast.export_checks import HASHED, READOUT, SUMS, ExportError
from comtip_fast.inference import Predictor
from comtip_fast.models import image_encoder
from comtip_fast.training.export_checkpoint import export_checkpoint
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer

VERIFIED = (*HASHED, READOUT)
SHORT = ["train.steps=2", "train.validate_every=0", "train.device=cpu"]


def train(folder: Path, overrides: list[str]) -> Path:
    config = load_config(None, [*overrides, *SHORT])
    Trainer(build_task(config, torch.device("cpu")), config, folder).fit()
    return folder


@pytest.fixture(scope="module")
def run_dir(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("exports") / "run", tiny_overrides)


@pytest.fixture
def export(run_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_dir / "export", tmp_path / "export")
    return tmp_path / "export"


def make_old(folder: Path) -> None:
    """Convert an export to a release without hashes."""
    (folder / SUMS).unlink()
    edit_json(folder, lambda meta: meta.pop("hashes"))


def edit_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    meta = json.loads((folder / "config.json").read_text())
    change(meta)
    (folder / "config.json").write_text(json.dumps(meta))


def edit_lines(folder: Path, change: Callable[[list[str]], list[str]]) -> None:
    lines = (folder / "genes.tsv").read_text().splitlines()
    (folder / "genes.tsv").write_text("\n".join(change(lines)) + "\n")


def edit_arrays(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    arrays = {k: v.copy() for k, v in load_file(folder / name).items()}
    change(arrays)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / name)


def test_a_complete_export_and_one_without_hashes_load(export: Path):
    new = Bundle.load(export)
    assert sorted(p.name for p in export.iterdir()) == sorted([*VERIFIED, "README.md", SUMS])
    # README.md may be edited by users.
    (export / "README.md").write_text("my notes")
    assert len(Bundle.load(export).genes) == len(new.genes)
    make_old(export)
    assert [g.key for g in Bundle.load(export).genes] == [g.key for g in new.genes]


def test_sums_are_those_of_sha256sum(export: Path):
    import hashlib

    lines = dict(reversed(line.split("  ")) for line in (export / SUMS).read_text().splitlines())  # type: ignore[misc]
    assert lines == {n: hashlib.sha256((export / n).read_bytes()).hexdigest() for n in VERIFIED}


@pytest.mark.parametrize("name", VERIFIED)
@pytest.mark.parametrize("kind", ["byte", "cut", "gone"])
def test_any_change_of_a_file_is_named(name: str, kind: str, export: Path):
    path = export / name
    raw = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(raw[: len(raw) - 40])
    else:
        # The last byte: of a weight, of a gene's flag, of a brace's newline.
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    expected = FileNotFoundError if (name, kind) == ("config.json", "gone") else ValueError
    with pytest.raises(expected, match=r"config\.json" if name == "config.json" else name.replace(".", r"\.")):
        Bundle.load(export)


def test_removed_hashes_are_detected(export: Path):
    (export / SUMS).unlink()
    with pytest.raises(ValueError, match=rf"{SUMS}: missing"):
        Bundle.load(export)


def _swap_sets(lines: list[str]) -> list[str]:
    """Move a held-out gene to the position of a trained one."""
    held = next(i for i, line in enumerate(lines) if line.endswith("\t0\t1"))
    return [lines[0], lines[held], *lines[1:held], *lines[held + 1 :]]


GENES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "a trained gene cut": (lambda x: [x[0], *x[2:]], "trained genes, which must come first"),
    "all but three cut": (lambda x: x[:4], "the model was trained on"),
    "a held-out gene in front": (_swap_sets, "trained genes, which must come first"),
    "a gene twice": (lambda x: [*x[:-1], x[-2]], "is a duplicate"),
    "no key": (lambda x: [x[0], "\t" + x[1].split("\t", 1)[1], *x[2:]], "the key is empty"),
    "a cell missing": (lambda x: [x[0], x[1].rsplit("\t", 1)[0], *x[2:]], "does not have 6 cells"),
    "a cell more": (lambda x: [x[0], x[1] + "\tx", *x[2:]], "does not have 6 cells"),
    "another flag": (lambda x: [x[0], x[1][:-3] + "2\t0", *x[2:]], "must be 1 and 0, or 0 and 1"),
    "another header": (lambda x: [x[0].upper(), *x[1:]], "columns"),
    "no header": (lambda x: x[1:], "columns"),
    "a formula": (
        lambda x: [x[0], x[1].replace("\t", "\t=HYPERLINK(1)", 1), *x[2:]],
        "line 2: a spreadsheet would run",
    ),
    "one huge cell": (lambda x: [x[0], "x" * 200_000 + x[1], *x[2:]], "not a table of genes"),
}


@pytest.mark.parametrize("case", GENES)
def test_gene_rows_that_do_not_fit_are_refused_without_hashes_too(case: str, export: Path):
    make_old(export)
    change, message = GENES[case]
    edit_lines(export, change)
    with pytest.raises(ValueError, match=rf"genes\.tsv.*{message}"):
        Bundle.load(export)


def set_one(name: str, value: float, at: Any = 0) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name].reshape(-1)[at] = value

    return change


LEVELS: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    **{
        f"NaN in {n}": (set_one(n, np.nan), f"1 of [0-9]+ values of {n} are {'NaN' if n == 'edges' else 'not finite'}")
        for n in ("edges", "value_cp10k", "value_raw", "log_prior")
    },
    "infinite value": (set_one("value_cp10k", np.inf, -1), "values of value_cp10k are not finite"),
    "a row less": (lambda a: a.update(value_raw=a["value_raw"][1:]), "value_raw is"),
    "a level less": (lambda a: a.update(log_prior=a["log_prior"][:, 1:]), "log_prior is"),
    "doubles": (lambda a: a.update(edges=a["edges"].astype(np.float64)), "edges is float64"),
    "an array less": (lambda a: a.pop("edges"), "expected"),
    "an array more": (lambda a: a.update(more=np.zeros(3, np.float32)), "expected"),
    "edges descend": (lambda a: a.update(edges=a["edges"][:, ::-1]), "not ascending"),
}


@pytest.mark.parametrize("case", LEVELS)
def test_levels_that_do_not_fit_are_refused_without_hashes_too(case: str, export: Path):
    make_old(export)
    change, message = LEVELS[case]
    edit_arrays(export, "levels.safetensors", change)
    with pytest.raises(ValueError, match=rf"levels\.safetensors: .*{message}"):
        Bundle.load(export)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_without_hashes_too(bad: float, export: Path):
    make_old(export)
    names = sorted(k for k, v in load_file(export / "model.safetensors").items() if v.dtype == np.float32)
    for name in (names[0], names[len(names) // 2], names[-1]):
        before = (export / "model.safetensors").read_bytes()
        edit_arrays(export, "model.safetensors", set_one(name, bad, -1))
        with pytest.raises(ValueError, match=rf"model\.safetensors: {name} has values that are not finite"):
            Bundle.load(export)
        (export / "model.safetensors").write_bytes(before)


def test_weights_of_another_model_are_named(export: Path):
    make_old(export)
    name = min(load_file(export / "model.safetensors"))
    before = (export / "model.safetensors").read_bytes()
    for change, message in (
        (lambda a: a.pop(name), "tensors missing"),
        (lambda a: a.update(more=np.zeros(3, np.float32)), "unknown: more"),
        (lambda a: a.update({name: np.concatenate([a[name], a[name]])}), "the model needs"),
    ):
        edit_arrays(export, "model.safetensors", change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
            Bundle.load(export)
        (export / "model.safetensors").write_bytes(before)
    (export / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      "[:9])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        Bundle.load(export)


CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no sizes": lambda m: m.pop("sizes"),
    "sizes of another name": lambda m: m["sizes"].update(x=1),
    "no tile": lambda m: m.pop("tile_um"),
    "config is a list": lambda m: m.update(config=[]),
    "sizes are a list": lambda m: m.update(sizes=[1, 2]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_invalid_config_is_named(case: str, export: Path):
    make_old(export)
    edit_json(export, CONFIGS[case])
    with pytest.raises(ValueError, match=r"config\.json"):
        Bundle.load(export)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000])
def test_a_config_that_is_not_json_is_named(text: str, export: Path):
    (export / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        Bundle.load(export)


def test_predict_with_a_bad_export_has_code_2(export: Path, tiny_shards: ShardSet, capsys: pytest.CaptureFixture[str]):
    lines = (export / "genes.tsv").read_text().splitlines()
    (export / "genes.tsv").write_text("\n".join([lines[0], *reversed(lines[1:6]), *lines[6:]]) + "\n")
    out = export.parent / "x.h5ad"
    assert main(["predict", str(export), f"{tiny_shards.path}:x1", "--out", str(out)]) == 2
    assert "genes.tsv: the SHA-256 differs" in capsys.readouterr().err
    assert not out.exists()


# -- self-contained ------------------------------------------------------------------------------------------------


def no_network(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("weights were fetched")


@pytest.mark.parametrize("pretrained", ["gone.safetensors", "hub"])
def test_an_export_needs_no_pretrained_weights(
    pretrained: str, export: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Also exports of other releases, whose config names a file or the hub."""
    plain = image_encoder.timm.create_model

    def create(name: str, **options: Any) -> Any:
        assert not options.get("pretrained"), "weights were fetched"
        return plain(name, **options)

    monkeypatch.setattr(image_encoder.timm, "create_model", create)
    make_old(export)
    edit_json(export, lambda m: m["config"]["vision"].update(pretrained=pretrained))
    edit_json(export, lambda m: m["config"]["train"].update(start_from=str(tmp_path / "gone")))
    bundle = Bundle.load(export)
    assert (bundle.config.vision.pretrained, bundle.config.train.start_from) == ("", "")
    bundle.save(tmp_path / "again")
    again = Predictor.load(tmp_path / "again")
    assert (again.config.vision.pretrained, again.bundle.initial_weights) == ("", pretrained)


def test_a_run_resumes_and_is_exported_without_the_file_of_initial_weights(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import timm
    from safetensors.torch import save_file as save_tensors

    backbone = "vit_tiny_patch16_224"
    weights = tmp_path / "vit.safetensors"
    net = timm.create_model(backbone, pretrained=False, img_size=32, num_classes=0)
    save_tensors({k: v.clone() for k, v in net.state_dict().items()}, weights)
    config = tmp_path / "c.yaml"
    config.write_text("{}\n")
    settings = [*tiny_overrides, *SHORT, f"vision.backbone={backbone}", f"vision.pretrained={weights}"]
    arguments = ["pretrain", "--config", str(config), "--out", str(tmp_path / "run")]
    arguments += [f"--set={s}" for s in settings]
    assert main(arguments) == 0
    weights.unlink()
    assert main([*arguments, "--resume"]) == 0
    assert export_checkpoint(tmp_path / "run", "newest", tmp_path / "out") == 2
    one, other = (load_file(p / "model.safetensors") for p in (tmp_path / "out", tmp_path / "run" / "export"))
    assert all((one[k] == other[k]).all() for k in one.keys() | other.keys())
    predictor = Predictor.load(tmp_path / "run")
    capsys.readouterr()
    # A new run needs the file.
    assert main([*arguments[:4], str(tmp_path / "new"), *arguments[5:]]) == 2
    assert "vision.pretrained" in capsys.readouterr().err
    # So do methods that start where the run started.
    with pytest.raises(FileNotFoundError, match="initial weights is missing; copy it there, or leave out the methods"):
        initial_encoder(predictor, 0)
    save_tensors({k: v.clone() for k, v in net.state_dict().items()}, weights)
    block = "blocks.0.mlp.fc1.weight"
    assert (initial_encoder(predictor, 0).state_dict()[block] == net.state_dict()[block]).all()


@pytest.mark.parametrize(
    ("changed", "fix"),
    [
        (["shards", "trained genes"], "give the shard sets that the run had at this step with `shards`"),
        (["tokenizer"], "use the release that trained the run"),
        (["gene vectors"], "restore the file that text.gene_vectors names"),
    ],
)
def test_an_error_of_changed_inputs_states_the_fix_for_the_input_that_changed(changed: list[str], fix: str):
    from comtip_fast.training.export_checkpoint import _fix_of

    assert _fix_of(changed) == fix


def test_a_checkpoint_of_an_earlier_version_is_exported_with_its_rules(
    run_dir: Path, tiny_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Regression test: genes were chosen with today's defaults, others than those of the weights."""
    from comtip_fast.training import export_checkpoint as exporting
    from comtip_fast.training.checkpoint import store

    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    step, newest = store.newest_good(run / "checkpoints", store.load)
    del newest.state["config"]["genes"]["detected_in"], newest.state["config"]["panel"]["balance"]
    store.replace_state(run / "checkpoints", step, newest.state)
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["genes"]["detected_in"], config["panel"]["balance"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    used = []

    def build_task(config: Any, *_: Any, **__: Any) -> None:
        used.append((config.genes.detected_in, config.panel.balance))
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "build_task", build_task)
    with pytest.raises(KeyboardInterrupt):
        exporting.export_checkpoint(run, "newest", tmp_path / "out", str(tiny_shards.path))
    assert used == [("every", "none")]


def test_the_readout_of_a_checkpoint_is_fitted_with_other_settings_at_export(
    run_dir: Path, tiny_shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sets = ["--shards", str(tiny_shards.path), "--set", "readout.kind=linear"]
    assert main(["export", str(run_dir), "--checkpoint", "newest", "--out", str(tmp_path / "out"), *sets]) == 0
    linear, own = Bundle.load(tmp_path / "out"), Bundle.load(run_dir / "export")
    assert linear.config.readout.kind == "linear"
    assert linear.readout is not None
    assert own.readout is not None
    assert not any(linear.readout.heads[0].map_of(b).kernels for b in linear.readout.heads[0].blocks)
    kinds = {facts["kind"] for facts in own.readout.heads[0].facts["vector"].values()}
    assert bool(own.readout.heads[0].map_of("vector").kernels) == ("kernel" in kinds)
    capsys.readouterr()
    assert main(["export", str(run_dir), "--out", str(tmp_path / "copy"), *sets[2:]]) == 2
    assert "--set has no effect here: used with --checkpoint only" in capsys.readouterr().err
    arguments = ["export", str(run_dir), "--checkpoint", "newest", "--out", str(tmp_path / "other")]
    assert main([*arguments, "--set", "align.dim=8"]) == 2
    assert "align.dim=8: only keys of the readout" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_urls_in_a_config_of_a_run_are_not_downloaded(
    run_dir: Path,
    tiny_shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from comtip_shards.storage import remote

    monkeypatch.setattr(remote.Remote, "fetch", no_network)
    monkeypatch.setattr(remote.Remote, "read", no_network)
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    url = "https://example.invalid/shards"
    text = (run / "config.yaml").read_text().replace(str(tiny_shards.path), url)
    assert url in text
    (run / "config.yaml").write_text(text)
    assert main(["export", str(run), "--checkpoint", "newest", "--out", str(tmp_path / "out")]) == 2
    stderr = capsys.readouterr().err
    assert url in stderr
    assert "give all sets of the run with --shards" in stderr
    shards = ["--shards", str(tiny_shards.path)]
    assert main(["export", str(run), "--checkpoint", "newest", *shards, "--out", str(tmp_path / "out")]) == 0
    make_old(run / "export")
    edit_json(run / "export", lambda m: m["config"]["data"].update(shards=url))
    capsys.readouterr()
    assert main(["evaluate", str(run), *shards, "--sections", "x1", "--out", str(tmp_path / "e")]) == 2
    stderr = capsys.readouterr().err
    assert url in stderr
    assert "give all sets of the run with --train-shards" in stderr


def test_an_evaluation_of_an_export_that_names_a_url_connects_nowhere(
    export: Path,
    tiny_shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Neither its config nor a link in a folder of its own leads to a host."""
    from comtip_shards.storage import remote

    asked: list[str] = []

    def connect(self: remote.Remote, *_args: Any, **_kwargs: Any) -> Any:
        asked.append(str(self.url))
        raise OSError("no network")

    monkeypatch.setattr(remote.Remote, "_filesystem", connect)
    make_old(export)
    for url in (
        "https://example.invalid/shards",
        "s3://bucket/shards",
        "hf://datasets/a/b",
        "HTTPS://example.invalid/x",
    ):
        edit_json(export, lambda m, url=url: m["config"]["data"].update(shards=url))
        args = [
            "evaluate",
            str(export),
            "--shards",
            str(tiny_shards.path),
            "--sections",
            "x1",
            "--out",
            str(tmp_path / "e"),
        ]
        assert main(args) == 2
        assert "give all sets of the run with --train-shards" in capsys.readouterr().err
        assert asked == []


def test_the_error_of_a_run_without_an_export_names_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "not finished, so it has no export; export a checkpoint, e.g. --checkpoint newest" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["newest", "best"])
def test_a_checkpoint_that_a_live_run_deletes_is_read_again(
    which: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from comtip_fast.training import export_checkpoint as exporting
    from comtip_fast.training.checkpoint import store as checkpoints
    from comtip_fast.training.checkpoint.content import sha256_of

    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    root = run / "checkpoints"
    (last,) = checkpoints.steps_of(root)
    state = json.loads((checkpoints.folder_of(root, last) / "state.json").read_text())
    plain, moves = checkpoints.load_state, [0]

    def load_state(folder: Path, **more: bool) -> Any:
        """Three times, the run replaces the checkpoint that is being read by a newer one."""
        if moves[0] < 3:
            moves[0] += 1
            newer = checkpoints.folder_of(root, last + moves[0])
            folder.rename(newer)
            text = json.dumps(state | {"best_step": last + moves[0], "step": last + moves[0]})
            (newer / "state.json").write_text(text)
            sums = "".join(f"{sha256_of(newer / n)}  {n}\n" for n in checkpoints.FILES)
            (newer / checkpoints.SUMS).write_text(sums)
        return plain(folder, **more)

    monkeypatch.setattr(checkpoints, "load_state", load_state)
    assert exporting.export_checkpoint(run, which, tmp_path / "out") == last + 3
    assert moves == [3]


def test_a_model_card_holds_no_markup_of_its_sections(run_dir: Path, tmp_path: Path):
    bundle = Bundle.load(run_dir / "export")
    bad = {"attribution": "<script>alert(1)</script>\n# heading", "donor": "a|b", "licence": ""}
    bundle.sections = [bundle.sections[0] | bad]
    bundle.save(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; # heading" in text
    assert r"| a\|b |" in text


def edit_readout(folder: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], Any]) -> None:
    path = folder / READOUT
    with safe_open(path, framework="numpy") as file:
        header, arrays = json.loads(file.metadata()["header"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(arrays, header)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path, metadata={"header": json.dumps(header)})


def _set_head(name: str, value: Any) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    return lambda arrays, header: header["heads"][0].update({name: value})


def _set_mix(mix: dict[str, float]) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    return _set_head("mix", {"cp10k": {"vector": 0.5, "levels": 0.5}, "raw": mix})


READOUTS: dict[str, tuple[Callable[[dict[str, np.ndarray], dict[str, Any]], Any], str]] = {
    "NaN": (
        lambda a, h: a["0.vector.raw.loading_KG"].__setitem__((0, 0), np.nan),
        "1 of [0-9]+ values of 0.vector.raw.loading_KG are not finite",
    ),
    "a gene cut": (lambda a, h: a.update({"0.vector.raw.mean_G": a["0.vector.raw.mean_G"][1:]}), "mean_G is float32"),
    "no programme": (
        lambda a, h: a.update({"0.vector.raw.weight_FK": a["0.vector.raw.weight_FK"][:, :0]}),
        "weight_FK is float32",
    ),
    "a scalar": (lambda a, h: a.update({"0.vector.raw.weight_FK": np.float32(1)}), "weight_FK is float32"),
    "features cut": (lambda a, h: a.update({"0.mean": a["0.mean"][1:]}), "mean is float32"),
    "float64": (lambda a, h: a.update({"0.std": a["0.std"].astype(np.float64)}), "std is float64"),
    "negative": (lambda a, h: a["0.std"].__setitem__(0, -1), "negative"),
    "an array missing": (lambda a, h: a.pop("0.vector.cp10k.std_G"), "missing or unknown: 0.vector.cp10k.std_G"),
    "another version": (lambda a, h: h.update(version=7), "version 7"),
    "no heads": (lambda a, h: h.update(heads=[]), "no list of heads"),
    "a head twice": (lambda a, h: h["heads"].append(h["heads"][0]), "has 2 heads"),
    "a gene twice": (lambda a, h: h["heads"][0]["keys"].append(h["heads"][0]["keys"][0]), "duplicate"),
    "an unknown gene": (_set_head("keys", ["human:NOTHING"]), "not trained genes of the model: human:NOTHING"),
    "genes are no list": (_set_head("keys", 3), "not a list of genes"),
    "another block": (lambda a, h: h["heads"][0]["blocks"].append("frozen"), "blocks are"),
    "weights above 1": (_set_mix({"vector": 2, "levels": -1}), "must be 0 to 1"),
    "all on levels": (_set_mix({"vector": 0.0, "levels": 1.0}), "not all on levels"),
    "no weight of levels": (_set_mix({"vector": 1.0}), "expected a weight"),
    "weights of one normalisation": (
        _set_head("mix", {"raw": {"vector": 0.5, "levels": 0.5}}),
        "weights for cp10k and raw",
    ),
    "weights of both": (_set_head("mix", {"vector": 0.5, "levels": 0.5}), "weights for cp10k and raw"),
    "two weights of levels": (
        _set_head("mix", {"cp10k": {"vector": 0.5, "levels": 0.5}, "raw": {"vector": 0.6, "levels": 0.4}}),
        "must be the same",
    ),
    "no cohort": (_set_head("cohort", None), "cohort is None, expected text"),
    "too many views": (lambda a, h: h["settings"].update(views=9), "views 9"),
    "another space": (lambda a, h: h["settings"].update(vector_dim=31), "vector_dim 31"),
    "too wide a radius": (lambda a, h: h["settings"].update(radii=[1.3, 1e9]), "radii are"),
    "another first radius": (lambda a, h: h["settings"].update(radii=[1.0, 3.4]), "radii are"),
    "descending radii": (lambda a, h: h["settings"].update(radii=[1.3, 3.4, 2.0]), "radii are"),
    "many radii": (lambda a, h: h["settings"].update(radii=[1.3] * 5), "radii are"),
    "a kernel of no length": (
        lambda a, h: a["0.vector.kernel0.length_1"].fill(0),
        "length of a kernel must be above 0",
    ),
    "no landmarks": (
        lambda a, h: a.update({"0.vector.kernel0.landmark_MP": a["0.vector.kernel0.landmark_MP"][:0]}),
        "landmark_MP is float32",
    ),
    "a landmark missing": (
        lambda a, h: a.update({"0.vector.kernel0.landmark_MP": a["0.vector.kernel0.landmark_MP"][1:]}),
        "weight_FK is float32",
    ),
    "a basis cut": (
        lambda a, h: a.update({"0.vector.kernel0.basis_FP": a["0.vector.kernel0.basis_FP"][1:]}),
        "basis_FP is float32",
    ),
    "a basis that is a number": (
        lambda a, h: a.update({"0.vector.kernel0.basis_FP": np.float32(1)}),
        "basis_FP is float32",
    ),
    "landmarks of a number": (
        lambda a, h: a.update({"0.vector.kernel0.landmark_MP": np.float32(1)}),
        "landmark_MP is float32",
    ),
    "a kernel more than stated": (
        lambda a, h: a.update({"0.vector.kernel1.length_1": np.ones(1, np.float32)}),
        "missing or unknown: 0.vector.kernel1.length_1",
    ),
    "no kernel and no features": (_set_head("maps", {"vector": {"kernels": 0, "linear": False}}), "maps are"),
    "a million kernels": (_set_head("maps", {"vector": {"kernels": 10**6, "linear": False}}), "maps are"),
    "text for kernels": (_set_head("maps", {"vector": {"kernels": "1", "linear": False}}), "maps are"),
    "maps of another block": (_set_head("maps", {"frozen": {"kernels": 1, "linear": False}}), "maps are"),
    "maps in a list": (_set_head("maps", [1]), "maps are"),
    "text for views": (lambda a, h: h["settings"].update(views="2"), "settings are"),
}


@pytest.mark.parametrize("case", READOUTS)
def test_a_readout_that_does_not_fit_is_refused_without_hashes_too(case: str, export: Path):
    make_old(export)
    change, says = READOUTS[case]
    edit_readout(export, change)
    with pytest.raises(ExportError, match=rf"readout\.safetensors.*{says}"):
        Bundle.load(export)


def test_a_readout_that_is_no_safetensors_or_missing_is_refused(export: Path):
    make_old(export)
    (export / READOUT).write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"readout\.safetensors: not a valid readout"):
        Bundle.load(export)
    (export / READOUT).unlink()
    with pytest.raises(ExportError, match=r"readout\.safetensors: missing"):
        Bundle.load(export)
    edit_json(export, lambda meta: meta.update(readout="../elsewhere.safetensors"))
    with pytest.raises(ExportError, match=r"readout is '\.\./elsewhere"):
        Bundle.load(export)
