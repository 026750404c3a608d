"""``text.gene_vectors``: gene vectors join the names in gene sentences, and predict genes that no image was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comtip_shards import ShardSet

import comtip_fast
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import TextConfig
from comtip_fast.data.coexpression.vectors import gene_vectors
from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.evaluation.run import evaluate_run
from comtip_fast.export import Bundle
from comtip_fast.export_checks import HASHED, READOUT, SUMS, VECTORS, ExportError, write_sums
from comtip_fast.genes import GENE_ID, VALUE_ID, GeneTokenizer
from comtip_fast.genes.tokens import drop_names_or_vectors, gene_tokens, vector_rows
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.inference import GeneQuery, ImageFeatures, Predictor
from comtip_fast.lineage import FILE
from comtip_fast.metrics import mean_pcc
from comtip_fast.runtime import devices
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.task import CoMTIPTask, build_task
from comtip_fast.training.trainer import Trainer
from testkit.host_reads import HostReads
from testkit.tiny import SYMBOLS, TinySection, write_tiny_source

UNSEEN = SYMBOLS[10:20]
"""Five genes that rise with the field and five that fall; nothing in their names says which."""


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors from the counts of two further donors, without their images."""
    folder = tmp_path_factory.mktemp("reference")
    write_tiny_source(folder, [TinySection("r1", "donor_r", ""), TinySection("r2", "donor_s", "")], seed=9)
    found = gene_vectors(
        [folder / "r1.tsv.gz", folder / "r2.tsv.gz"], components=3, species="human", licence="CC-BY-4.0"
    )
    found.save(folder / "v.safetensors")
    return folder / "v.safetensors"


def settings(overrides: list[str], *more: str) -> list[str]:
    held_out = f"genes.held_out=[{','.join(UNSEEN)}]"
    fast = ["train.steps=200", "train.validate_every=40", "optim.lr=1.5e-3", "vision.stem=efficientnet_lite0"]
    fast += ["loss.nce=0.5", "loss.mfm=0.3"]
    return [*overrides, *fast, "genes.held_out_every=0", held_out, "readout.kind=levels", *more]


@pytest.fixture(scope="module")
def runs(tiny_overrides: list[str], vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on a set where every gene has the same name, without and with gene vectors, and one with names and vectors."""
    out = tmp_path_factory.mktemp("runs")
    with_vectors = [f"text.gene_vectors={vectors}"]
    for name, more in {"same names": [], "vectors": with_vectors, "names and vectors": with_vectors}.items():
        config = load_config(None, settings(tiny_overrides, *more))
        with one_name_for_all() if name != "names and vectors" else nullcontext():
            Trainer(build_task(config, torch.device("cpu")), config, out / name).fit()
    return {name: out / name for name in ("same names", "vectors", "names and vectors")}


@contextmanager
def one_name_for_all() -> Iterator[None]:
    """Give all genes the tokens of one name, so that names carry nothing."""
    with pytest.MonkeyPatch.context() as patch:
        real = GeneTokenizer.encode
        patch.setattr(GeneTokenizer, "encode", lambda self, s, n, most: real(self, "GENE", "", most))
        yield


def features_of(predictor: Predictor, shards: ShardSet) -> tuple[np.ndarray, ImageFeatures]:
    """Return the spots and features of the test section."""
    number = shards.section_number("x1")
    spots = shards.select(sections=[number])
    return spots, predictor.image_features(shards.tiles(spots).transpose(0, 3, 1, 2), shards.stain(number))


def scores(run: Path, shards: ShardSet, queries: list[GeneQuery]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return measured and predicted log1p CP10K of genes in the test section."""
    predictor = Predictor.load(run)
    spots, features = features_of(predictor, shards)
    row = {g.key: i for i, g in enumerate(shards.genes)}
    measured = log1p_cp10k(shards.counts(spots))[:, [row[q.key] for q in queries]].toarray()
    seen = [GeneQuery(g.symbol, g.name, g.key) for g in predictor.bundle.genes if g.trained]
    maps = {
        "unseen": predictor.predict(features, queries)["cp10k"],
        "mean map": predictor.predict(features, seen)["cp10k"].mean(1, keepdims=True).repeat(len(queries), axis=1),
    }
    return measured, maps


def scores_of_trained(run: Path, shards: ShardSet, *, names_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return measured and predicted log1p CP10K of the trained genes."""
    predictor = Predictor.load(run)
    trained = [g for g in predictor.bundle.genes if g.trained]
    spots, features = features_of(predictor, shards)
    row = {g.key: i for i, g in enumerate(shards.genes)}
    measured = log1p_cp10k(shards.counts(spots))[:, [row[g.key] for g in trained]].toarray()
    queries = [GeneQuery(g.symbol, g.name, None if names_only else g.key) for g in trained]
    return measured, predictor.predict(features, queries)["cp10k"]


def queries_of(shards: ShardSet, named: bool = True) -> list[GeneQuery]:
    genes = {g.symbol: g for g in shards.genes}
    return [GeneQuery(s if named else "", genes[s].name if named else "", genes[s].key) for s in UNSEEN]


def test_vectors_predict_unseen_genes_where_names_carry_nothing(runs: dict[str, Path], tiny_shards: ShardSet):
    pcc = {}
    with one_name_for_all():
        for run in ("same names", "vectors"):
            measured, maps = scores(runs[run], tiny_shards, queries_of(tiny_shards))
            pcc |= {f"{run}, {name}": mean_pcc(measured, values) for name, values in maps.items()}
            assert mean_pcc(*scores_of_trained(runs[run], tiny_shards)) > 0.3, "the run has learnt"
        measured, maps = scores(runs["vectors"], tiny_shards, queries_of(tiny_shards, named=False))
        pcc["vectors, no name"] = mean_pcc(measured, maps["unseen"])
        # The control: the vectors of other genes. Neighbours in the list have opposite signs.
        bundle = Bundle.load(runs["vectors"] / "export")
        assert bundle.vectors is not None
        order = [bundle.vectors.row[k] for k in np.roll(bundle.vectors.keys, 1)]
        shuffled = replace(bundle.vectors, vector_GK=bundle.vectors.vector_GK[order])
        predictor = Predictor(replace(bundle, vectors=shuffled))
        control = predictor.predict(features_of(predictor, tiny_shards)[1], queries_of(tiny_shards))["cp10k"]
        pcc["vectors, shuffled"] = mean_pcc(measured, control)
    for other in ("vectors, mean map", "same names, unseen", "same names, mean map", "vectors, shuffled"):
        assert pcc["vectors, unseen"] > pcc[other] + 0.3, pcc
        assert pcc["vectors, no name"] > pcc[other] + 0.3, pcc


def test_a_gene_with_only_a_name_or_only_a_vector_is_predicted(runs: dict[str, Path], tiny_shards: ShardSet):
    """Trained genes by their names, without identity and vector, and unseen genes by their vectors."""
    run = runs["names and vectors"]
    assert mean_pcc(*scores_of_trained(run, tiny_shards, names_only=True)) > 0.2
    measured, maps = scores(run, tiny_shards, queries_of(tiny_shards, named=False))
    assert mean_pcc(measured, maps["unseen"]) > mean_pcc(measured, maps["mean map"]) + 0.3


def test_by_default_nothing_changes(tiny_overrides: list[str]):
    task = build_task(load_config(None, tiny_overrides), torch.device("cpu"))
    assert not [n for n in task.model.state_dict() if "vector" in n and n.startswith("genes.")]
    assert task.fingerprint().keys() == {"shards", "shard sets", "tokenizer", "trained genes"}
    assert task.genes.vector_GK is None
    bundle = task.bundle()
    assert bundle.vectors is None
    assert bundle.sizes.vector_dim == 0


def test_the_projection_learns_and_only_genes_with_a_vector_use_it(tiny_overrides: list[str], vectors: Path):
    task = make(tiny_overrides, vectors)
    task.prepare()
    batch = task.batch(task.batches(0)[0], 1, 0)
    losses, _ = task.losses(task.model, batch)
    losses["loss"].backward()
    weight = task.model.genes.project_vector.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        with_vector = task.model.genes(task.genes)
        none = task.genes.vector_GK.clone()
        none[::2] = 0
        mixed = task.model.genes(replace(task.genes, vector_GK=none))
        weight.zero_()
        bare = task.model.genes(task.genes)
    Q = task.sizes.n_levels
    rows = torch.arange(len(bare)) // Q % 2 == 0
    torch.testing.assert_close(mixed[rows], bare[rows])
    torch.testing.assert_close(mixed[~rows], with_vector[~rows])
    assert (mixed[~rows] - bare[~rows]).abs().max() > 1e-2
    task.close()


def make(overrides: list[str], vectors: Path, *more: str) -> CoMTIPTask:
    return build_task(load_config(None, [*overrides, f"text.gene_vectors={vectors}", *more]), torch.device("cpu"))


@pytest.mark.parametrize("more", [(), ("engine.panel_sizes=4",), ("engine.micro_batches=2",)])
def test_on_a_gpu_a_step_with_vectors_reads_nothing_and_has_the_same_losses(
    more: tuple[str, ...], tiny_overrides: list[str], vectors: Path, monkeypatch: pytest.MonkeyPatch
):
    """Regression test: the lengths of the sentences, which depend on the names that are dropped, were read from the device."""

    def step() -> tuple[dict[str, float], list[str]]:
        task = make(tiny_overrides, vectors, "text.vector_drop=0.4", "text.name_drop=0.4", "train.log_every=100", *more)
        engine = make_engine(task.module, task.config, task.group)
        batch = task.batch(task.batches(0)[0], 3, 0)
        with HostReads() as reads:
            engine.start_step(1e-3)
            losses, _ = forward_backward(engine, task, batch, task.config.engine.micro_batches)
        return {name: float(value) for name, value in losses.items()}, reads.found

    plain = step()[0]
    monkeypatch.setattr(devices, "reads_are_free", lambda device: False)
    losses, reads = step()
    assert reads == []
    assert losses == pytest.approx(plain, rel=1e-5)


def test_names_and_vectors_are_dropped_but_never_both():
    tokenizer, n = GeneTokenizer.load(), 400
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, 3)).astype(np.float32)
    rows[:50] = 0
    config = TextConfig(max_tokens=6, vector_drop=0.3, name_drop=0.2)
    genes = gene_tokens(tokenizer, [("KRT14", "keratin 14")] * n, np.arange(n), config, rows)
    out = drop_names_or_vectors(genes, torch.from_numpy(rng.random(n)), config)
    assert out.vector_GK is not None
    no_vector, no_name = ~(out.vector_GK != 0).any(1), out.length_G == 2
    assert no_vector[:50].all()
    assert not no_name[:50].any(), "a gene without a vector keeps its name"
    assert 0.24 < no_vector[50:].float().mean() < 0.36
    assert 0.14 < no_name[50:].float().mean() < 0.26
    assert not (no_vector & no_name).any()
    assert (out.ids_GT[no_name][:, :2] == torch.tensor([GENE_ID, VALUE_ID])).all()
    assert torch.equal(out.ids_GT[~no_name], genes.ids_GT[~no_name])
    assert torch.equal(
        out.identity_G, torch.where((no_vector | no_name) & torch.from_numpy((rows != 0).any(1)), 0, genes.identity_G)
    )
    # Sizes in host memory are those of the tensors.
    u_G = rng.random(n)
    both = drop_names_or_vectors(genes, torch.from_numpy(u_G), config, u_G)
    assert both.host is not None
    assert np.array_equal(both.host.length_G, both.length_G)
    assert np.array_equal(both.host.ids_GT, both.ids_GT)
    # A gene without symbol and name has its vector alone.
    alone = gene_tokens(tokenizer, [("", ""), ("", "")], np.zeros(2), config, rows[[0, 60]])
    assert alone.length_G.tolist() == [3, 2]


def test_an_export_holds_its_vectors_and_names_their_licence(runs: dict[str, Path], vectors: Path, tmp_path: Path):
    export = runs["vectors"] / "export"
    want = GeneVectors.load(vectors)
    bundle = Bundle.load(export)
    assert bundle.vectors is not None
    assert bundle.vectors.sha256 == want.sha256
    record = bundle.lineage.own.vectors
    assert record is not None
    assert (record.sha256, record.licence) == (want.sha256, "CC-BY-4.0")
    assert record.sources == ("r1.tsv.gz", "r2.tsv.gz")
    card = (export / "README.md").read_text()
    assert f"gene vectors {want.sha256[:16]} (licence: CC-BY-4.0)" in card
    assert "- CC-BY-4.0" in card
    assert VECTORS in (export / SUMS).read_text()
    bundle.save(tmp_path / "again")
    assert Bundle.load(tmp_path / "again").vectors.sha256 == want.sha256
    assert not (runs["same names"] / "export" / VECTORS).exists()


def test_predictions_and_scores_name_the_vectors(runs: dict[str, Path], tiny_shards: ShardSet):
    model = comtip_fast.load(runs["vectors"], "cpu")
    answer = model.predict(f"{tiny_shards.path}:x1", [UNSEEN[0], "TTN"])
    assert answer.uns["comtip"]["gene_vectors_licence"] == "CC-BY-4.0"
    assert "CC-BY-4.0" in answer.uns["comtip"]["training_licences"]
    result = evaluate_run(runs["vectors"], tiny_shards.path, genes=[UNSEEN[0]], null_draws=2, device="cpu")
    assert result.metrics["lineage"]["runs"][0]["gene_vectors"] == model.predictor.bundle.vectors.sha256


def edit_meta(folder: Path, key: str, value: object) -> None:
    meta = json.loads((folder / "config.json").read_text())
    meta[key] = value
    (folder / "config.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("case", ["a byte", "gone", "not stated", "of another model", "of another run"])
def test_damaged_or_other_vectors_are_refused(case: str, runs: dict[str, Path], vectors: Path, tmp_path: Path):
    export = shutil.copytree(runs["vectors"] / "export", tmp_path / "export")
    files = [n for n in (*HASHED, VECTORS) if n != READOUT]
    if case == "a byte":
        raw = (export / VECTORS).read_bytes()
        (export / VECTORS).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif case == "gone":
        (export / VECTORS).unlink()
    elif case == "not stated":
        edit_meta(export, "gene_vectors", None)
        write_sums(export, HASHED)
    else:
        own = GeneVectors.load(vectors)
        other = replace(own, vector_GK=own.vector_GK + 1)
        other.save(export / VECTORS)
        if case == "of another run":
            edit_meta(export, "gene_vectors", other.sha256)
        write_sums(export, files)
    with pytest.raises(
        ExportError, match=r"gene_vectors\.safetensors|gene vectors is .* in config\.json, but .* in lineage\.json"
    ):
        Bundle.load(export)


def test_further_vectors_add_genes_if_their_axes_agree(runs: dict[str, Path], vectors: Path, caplog):
    bundle = Bundle.load(runs["vectors"] / "export")
    own = GeneVectors.load(vectors)
    new = ["human:TTN", "human:ALB"]
    rng = np.random.default_rng(0)
    more = GeneVectors(
        [*own.keys[:5], *new],
        np.concatenate([own.vector_GK[:5], rng.normal(size=(2, 3))]).astype(np.float32),
        np.ones((7, 4), np.float32),
        np.ones(7, np.float32),
        {"licence": "MIT"},
    )
    predictor = Predictor(bundle, vectors=more)
    assert predictor.sentence_vectors is not None
    np.testing.assert_array_equal(vector_rows(predictor.sentence_vectors, new), more.vector_GK[5:])
    assert predictor.sentence_vectors.header["licence"] == "CC-BY-4.0; MIT"
    tokens, _ = predictor._tokens([GeneQuery("TTN", "titin", "human:TTN"), GeneQuery("X")])
    assert tokens.vector_GK[0].abs().sum() > 0
    assert tokens.vector_GK[1].abs().sum() == 0
    assert predictor.has_vector("human:TTN")
    other = replace(more, vector_GK=more.vector_GK[:, ::-1].copy())
    with pytest.raises(ValueError, match="fewer than 2 common genes, or other values for them"):
        Predictor(bundle, vectors=other)


def test_settings_that_cannot_work_are_refused(tiny_overrides: list[str], vectors: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"text\.vector_drop=0\.7 and text\.name_drop=0\.5: the sum is above 1"):
        make(tiny_overrides, vectors, "text.vector_drop=0.7", "text.name_drop=0.5")
    with pytest.raises(FileNotFoundError, match="no such file"):
        make(tiny_overrides, tmp_path / "none.safetensors")
    own = GeneVectors.load(vectors)
    mouse = replace(own, keys=[k.replace("human", "mouse") for k in own.keys])
    mouse.save(tmp_path / "mouse.safetensors")
    with pytest.raises(ValueError, match=r"vectors of 0 of the \d+ trained genes"):
        make(tiny_overrides, tmp_path / "mouse.safetensors")


def test_a_run_resumes_with_its_own_vectors_only(tiny_overrides: list[str], vectors: Path, tmp_path: Path):
    short = [*tiny_overrides, "train.steps=4", "train.validate_every=0", "train.checkpoint_every=2"]
    moved = shutil.copy(vectors, tmp_path / "v.safetensors")

    def pretrain(file: Path, *more: str, resume: bool = False) -> None:
        overrides = [*short, f"text.gene_vectors={file}", *more]
        comtip_fast.pretrain(None, tmp_path / "run", overrides=overrides, resume=resume, device="cpu")

    pretrain(vectors)
    pretrain(Path(moved), resume=True)
    own = GeneVectors.load(vectors)
    replace(own, vector_GK=own.vector_GK * 2).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="the input data has changed: gene vectors"):
        pretrain(tmp_path / "other.safetensors", resume=True)


def test_a_warm_start_takes_the_projection_of_equal_vectors_only(
    runs: dict[str, Path], tiny_overrides: list[str], vectors: Path, tmp_path: Path, caplog
):
    parent = Bundle.load(runs["vectors"] / "export").model.state_dict()
    start = [*settings(tiny_overrides), f"train.start_from={runs['vectors']}"]
    same = make(start, vectors).model.state_dict()
    for name in ("genes.project_vector.weight", "genes.vector_scale"):
        assert torch.equal(same[name], parent[name])
    own = GeneVectors.load(vectors)
    replace(own, vector_GK=own.vector_GK[:, ::-1].copy()).save(tmp_path / "other.safetensors")
    other = make(start, tmp_path / "other.safetensors").model.state_dict()
    assert not torch.equal(other["genes.project_vector.weight"], parent["genes.project_vector.weight"])
    assert "genes.project_vector.weight: the gene vectors differ" in caplog.text
    task = make(start, tmp_path / "other.safetensors")
    assert [run.vectors is not None for run in task.bundle().lineage.runs] == [True, True]
    assert (runs["vectors"] / "export" / FILE).is_file()
