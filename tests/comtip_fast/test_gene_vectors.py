"""Gene vectors from counts: the decomposition, the formats, the bounds and the file."""

import gzip
import io
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from comtip_shards.errors import SourceError
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import io as scipy_io
from scipy import sparse

from comtip_fast.cli import main
from comtip_fast.data.coexpression import counts as counts_module
from comtip_fast.data.coexpression.counts import open_counts
from comtip_fast.data.coexpression.vectors import gene_vectors
from comtip_fast.genes.vectors import GeneVectors, join_vectors

SYMBOLS = [
    "ERBB2",
    "KRT14",
    "KRT17",
    "CD74",
    "COL1A1",
    "COL3A1",
    "ACTA2",
    "VIM",
    "EPCAM",
    "KRT8",
    "KRT18",
    "KRT19",
    "MUC1",
    "ESR1",
    "PGR",
    "MKI67",
    "TOP2A",
    "CD3E",
    "CD8A",
    "MS4A1",
    "PECAM1",
    "FN1",
    "SPARC",
    "LUM",
    "DCN",
    "B2M",
    "FTH1",
    "GAPDH",
]


def make_counts(n: int, seed: int = 0, genes: int = len(SYMBOLS)) -> np.ndarray:
    """Counts with two programmes: even against odd genes, and the first half of the genes."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n, 1))
    sign = np.where(np.arange(genes) % 2 == 0, 1.0, -1.0)
    half = (np.arange(genes) < genes // 2).astype(float)
    return rng.poisson(np.exp(1.0 + 0.8 * a * sign + 0.6 * b * half)).astype(np.int32)


def write_table(path: Path, counts: np.ndarray, symbols: list[str] = SYMBOLS) -> Path:
    with gzip.open(path, "wt") as file:
        file.write("\t" + "\t".join(symbols) + "\n")
        for i, row in enumerate(counts):
            file.write(f"s{i}\t" + "\t".join(map(str, row)) + "\n")
    return path


def write_h5ad(path: Path, matrix: object, symbols: list[str] = SYMBOLS) -> Path:
    n = matrix.shape[0]  # type: ignore[attr-defined]
    ad.AnnData(matrix, pd.DataFrame(index=[f"c{i}" for i in range(n)]), pd.DataFrame(index=symbols)).write_h5ad(path)
    return path


def write_tenx(path: Path, counts: np.ndarray, symbols: list[str] = SYMBOLS) -> Path:
    matrix = sparse.csr_matrix(counts)
    with h5py.File(path, "w") as file:
        g = file.create_group("matrix")
        g["barcodes"] = np.array([f"c{i}-1".encode() for i in range(len(counts))])
        g["data"], g["indices"], g["indptr"] = matrix.data, matrix.indices, matrix.indptr
        g["shape"] = np.array([counts.shape[1], counts.shape[0]])
        f = g.create_group("features")
        f["id"] = f["name"] = np.array([s.encode() for s in symbols])
        f["feature_type"] = np.array([b"Gene Expression"] * len(symbols))
    return path


def write_mtx(folder: Path, counts: np.ndarray, symbols: list[str] = SYMBOLS, *, genes_file: bool = False) -> Path:
    """Write the three files of Cell Ranger (3 and later, packed; 2 has genes.tsv, unpacked)."""
    folder.mkdir(parents=True)
    matrix, kind = io.BytesIO(), [] if genes_file else ["Gene Expression"]
    scipy_io.mmwrite(matrix, sparse.coo_matrix(counts.T), field="integer")
    features = "".join("\t".join([s, s, *kind]) + "\n" for s in symbols)
    parts = {
        "matrix.mtx": matrix.getvalue(),
        "genes.tsv" if genes_file else "features.tsv": features.encode(),
        "barcodes.tsv": "".join(f"c{i}-1\n" for i in range(len(counts))).encode(),
    }
    for name, content in parts.items():
        path = folder / name if genes_file else folder / f"{name}.gz"
        path.write_bytes(content if genes_file else gzip.compress(content))
    return folder


def dense_loadings(parts: list[np.ndarray], k: int) -> np.ndarray:
    """The same vectors by a dense SVD of the standardised cells: an independent computation."""
    blocks = []
    for counts in parts:
        x = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
        blocks.append((x - x.mean(0)) / x.std(0))
    a = np.concatenate(blocks) / np.sqrt(sum(map(len, parts)))
    _, size, right = np.linalg.svd(a, full_matrices=False)
    return right[:k].T * size[:k]


def assert_same_up_to_sign(a: np.ndarray, b: np.ndarray, atol: float = 1e-3) -> None:
    sign = np.sign((a * b).sum(0))
    np.testing.assert_allclose(a, b * sign, atol=atol)


def test_vectors_equal_a_dense_svd_over_several_sources_and_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(counts_module, "TABLE_ROWS", 7)
    parts = [make_counts(60, 1), make_counts(45, 2)]
    paths = [write_table(tmp_path / f"{i}.tsv.gz", p) for i, p in enumerate(parts)]
    got = gene_vectors(paths, components=2, species="human")
    assert got.keys == [f"human:{s}" for s in SYMBOLS]
    assert_same_up_to_sign(got.vector_GK, dense_loadings(parts, 2))
    x = np.concatenate([np.log1p(p / p.sum(1, keepdims=True) * 1e4) for p in parts])
    np.testing.assert_allclose(got.moments_G4[:, 0], x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(got.moments_G4[:, 1], x.std(0), rtol=1e-4)
    np.testing.assert_allclose(got.moments_G4[:, 2], np.log1p(np.concatenate(parts)).mean(0), rtol=1e-4)


def test_every_format_gives_the_same_vectors(tmp_path: Path) -> None:
    counts = make_counts(50)
    text = gzip.decompress(write_table(tmp_path / "a.tsv.gz", counts).read_bytes()).decode()
    (tmp_path / "semicolons.txt").write_text(text.replace("\t", ";"))
    with gzip.open(tmp_path / "as_r_writes.csv.gz", "wt") as file:
        header, *rows = text.replace("\t", ",").splitlines()
        file.write("\n".join([",".join(f'"{name}"' for name in header.split(",")), *rows]) + "\n")
    sources = {
        "table": tmp_path / "a.tsv.gz",
        "table with semicolons": tmp_path / "semicolons.txt",
        "table with commas": tmp_path / "as_r_writes.csv.gz",
        "csr": write_h5ad(tmp_path / "b.h5ad", sparse.csr_matrix(counts.astype(np.float32))),
        "csc": write_h5ad(tmp_path / "c.h5ad", sparse.csc_matrix(counts.astype(np.float32))),
        "dense": write_h5ad(tmp_path / "d.h5ad", counts.astype(np.float32)),
        "tenx": write_tenx(tmp_path / "e.h5", counts),
        "mtx": write_mtx(tmp_path / "f" / "filtered_feature_bc_matrix", counts),
        "mtx of an output folder": tmp_path / "f",
        "mtx of cell ranger 2": write_mtx(tmp_path / "g" / "GRCh38", counts, genes_file=True).parent,
    }
    computed = {name: gene_vectors([path], components=3, species="human") for name, path in sources.items()}
    assert len({v.sha256 for v in computed.values()}) == 1, {n: v.sha256[:8] for n, v in computed.items()}


def test_an_mtx_folder_is_read_in_blocks_and_identified_by_its_three_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(counts_module, "BLOCK_ROWS", 16)
    counts = make_counts(50)
    folder = write_mtx(tmp_path / "sample", counts)
    source = open_counts(folder)
    blocks = [b.toarray() for b in source.blocks()]
    assert [len(b) for b in blocks] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), counts)
    monkeypatch.chdir(folder)
    recorded = gene_vectors(["."], components=2, species="human").header["sources"][0]
    assert (recorded["name"], recorded["sha256"], recorded["cells"]) == ("sample", source.sha256(), 50)
    with gzip.open(folder / "barcodes.tsv.gz", "wb") as file:
        file.write("".join(f"other{i}-1\n" for i in range(50)).encode())
    assert open_counts(folder).sha256() != recorded["sha256"]


def test_incomplete_and_ambiguous_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty: a folder without a 10x matrix .*; give an .h5ad"):
        open_counts(tmp_path / "empty")
    folder = write_mtx(tmp_path / "a" / "hg19", make_counts(20))
    with pytest.raises(
        SourceError, match=r"matrix.mtx.gz: one of the three files of a 10x matrix; give their folder, .*hg19$"
    ):
        open_counts(folder / "matrix.mtx.gz")
    write_mtx(tmp_path / "a" / "mm10", make_counts(20))
    with pytest.raises(SourceError, match=r"a: more than one matrix.mtx: .*hg19.*mm10"):
        open_counts(tmp_path / "a")
    (folder / "features.tsv.gz").unlink()
    with pytest.raises(SourceError, match=r"hg19: features.tsv.gz does not exist"):
        open_counts(folder)
    lines = tmp_path / "a" / "mm10" / "barcodes.tsv.gz"
    with gzip.open(lines, "wb") as file:
        file.write(b"c0-1\n")
    with pytest.raises(SourceError, match=r"the matrix shape is \(28, 20\), but there are 28 features and 1 barcodes"):
        gene_vectors([lines.parent], species="human")


def test_a_gene_measured_by_one_source_alone_has_a_vector_of_the_same_scale(tmp_path: Path) -> None:
    whole, part = make_counts(80, 1), make_counts(80, 2)[:, :-2]
    paths = [write_table(tmp_path / "a.tsv.gz", whole), write_table(tmp_path / "b.tsv.gz", part, SYMBOLS[:-2])]
    got = gene_vectors(paths, components=2, species="human")
    norm = np.linalg.norm(got.vector_GK, axis=1)
    only_one, both = (
        norm[[got.row[f"human:{s}"] for s in SYMBOLS[-2:]]],
        norm[[got.row[f"human:{s}"] for s in SYMBOLS[14:-2]]],
    )
    assert 0.6 < only_one.mean() / both.mean() < 1.6


def test_orthologues_share_a_vector_and_two_species_are_refused_without_them(tmp_path: Path) -> None:
    mouse = [s.capitalize() for s in SYMBOLS[:12]]
    human = write_table(tmp_path / "h.tsv.gz", make_counts(40, 1))
    table = tmp_path / "m.h5ad"
    write_h5ad(table, sparse.csr_matrix(make_counts(40, 2)[:, :12].astype(np.float32)), mouse)
    alone = gene_vectors([table], components=2, species="mouse")
    assert "mouse:Krt14" in alone.row
    ids = ["ENSMUSG00000045545.8", "ENSMUSG00000062312.5"]  # Krt14, Erbb2
    write_h5ad(table, sparse.csr_matrix(make_counts(40, 2)[:, :2].astype(np.float32)), ids)
    with pytest.raises(ValueError, match="two species; set `orthologues`"):
        gene_vectors([human, table], components=2, species="human")
    joined = gene_vectors([human, table], components=2, species="human", orthologues=True)
    a, b = joined.row["human:KRT14"], joined.row["mouse:Krt14"]
    np.testing.assert_array_equal(joined.vector_GK[a], joined.vector_GK[b])


def test_memory_is_bounded_by_a_block_and_not_by_the_cells(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(counts_module, "BLOCK_ROWS", 256)
    rng = np.random.default_rng(0)
    peaks = []
    for n in (2000, 16000):
        block = rng.poisson(1.0, (n, len(SYMBOLS))).astype(np.float32)
        path = write_h5ad(tmp_path / f"{n}.h5ad", sparse.csr_matrix(block))
        del block
        gene_vectors([path], components=2, species="human")  # caches of the gene table are not counted
        tracemalloc.start()
        gene_vectors([path], components=2, species="human")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks  # obs names and the index pointer grow, counts (8 times) do not


def test_the_file_round_trips_and_damage_is_found(tmp_path: Path) -> None:
    got = gene_vectors(
        [write_table(tmp_path / "a.tsv.gz", make_counts(30))], components=2, species="human", licence="CC0"
    )
    path = tmp_path / "v.safetensors"
    got.save(path)
    again = GeneVectors.load(path)
    assert (again.sha256, again.keys) == (got.sha256, got.keys)
    assert again.header["licence"] == "CC0"
    assert again.header["sources"][0]["cells"] == 30
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="do not match the hash"):
        GeneVectors.load(path)
    path.write_bytes(b"no such format")
    with pytest.raises(ValueError, match="not a file of gene vectors"):
        GeneVectors.load(path)
    with pytest.raises(FileNotFoundError, match="comtip genes vectors"):
        GeneVectors.load(tmp_path / "none.safetensors")


def test_what_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "a.tsv.gz", make_counts(10))
    with pytest.raises(ValueError, match=r"no gene has an Ensembl id of human or mouse.*set `species`"):
        gene_vectors([table])
    with pytest.raises(ValueError, match=r"at least 2 genes must vary.*, but of .* genes only 0 do; give more cells$"):
        gene_vectors([write_table(tmp_path / "flat.tsv.gz", np.ones((4, len(SYMBOLS)), int))], species="human")
    ensembl = write_table(tmp_path / "e.tsv.gz", make_counts(5, genes=2), ["ENSG00000999991", "ENSG00000999992"])
    with pytest.raises(ValueError, match=r"known for human, e.g. 'ENSG00000999991'; correct the identifiers"):
        gene_vectors([ensembl], species="human")
    with pytest.raises(
        FileNotFoundError, match=r"none.h5ad: no such file or folder; give a count matrix: an .h5ad, a 10x .h5, a 10x"
    ):
        open_counts(tmp_path / "none.h5ad")
    mixed = tmp_path / "mixed.tsv"
    mixed.write_text("id\tA\tB\nc1,1,2\n")
    with pytest.raises(SourceError, match="the separator of the header, a tab, is not in the row after it"):
        open_counts(mixed)
    latin = tmp_path / "latin.tsv"
    latin.write_bytes("id\té\tb\nc1\t1\t2\n".encode("latin-1"))
    with pytest.raises(SourceError, match="not UTF-8 text"):
        open_counts(latin)
    with pytest.raises(
        ValueError, match=r"no gene identifier is known for human, e.g. 'xx1'; check the identifiers and `species`"
    ):
        gene_vectors([write_table(tmp_path / "b.tsv.gz", make_counts(5, genes=2), ["xx1", "xx2"])], species="human")
    bad = write_h5ad(tmp_path / "n.h5ad", sparse.csr_matrix(np.full((4, len(SYMBOLS)), 0.5, np.float32)))
    with pytest.raises(SourceError, match="raw counts are needed"):
        gene_vectors([bad], species="human")
    with pytest.raises(SourceError, match="unknown format"):
        open_counts(write_table(tmp_path / "c.xls", make_counts(4)))
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(table.read_bytes()[:-40])
    with pytest.raises(SourceError, match="truncated"):
        gene_vectors([cut], species="human")
    cut.write_bytes(b"a text file with the wrong name")
    with pytest.raises(SourceError, match=r"truncated or damaged .*Not a gzipped file"):
        open_counts(cut)


def test_the_command_writes_the_file_and_names_what_it_covers(tmp_path: Path, capsys) -> None:
    table, out = write_table(tmp_path / "a.tsv.gz", make_counts(20)), tmp_path / "v.safetensors"
    command = ["genes", "vectors", str(table), "--species", "human"]
    assert main([*command, "--licence", "CC0", "--components", "2", "--out", str(out)]) == 0
    assert "28 genes x 2 components (28 human)" in capsys.readouterr().out
    assert GeneVectors.load(out).header["tissue"] == ""
    assert main(["genes", "vectors", str(table), "--out", str(tmp_path / "v.npy")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err


def two_species(tmp_path: Path) -> list[GeneVectors]:
    human = gene_vectors([write_table(tmp_path / "h.tsv.gz", make_counts(40, 1))], components=3, species="human")
    table = tmp_path / "m.h5ad"
    write_h5ad(
        table,
        sparse.csr_matrix(make_counts(40, 2)[:, :12].astype(np.float32)),
        [s.capitalize() for s in SYMBOLS[:12]],
    )
    return [human, gene_vectors([table], components=2, species="mouse", licence="CC0", tissue="bulb")]


def test_files_of_two_species_are_joined_on_axes_of_their_own(tmp_path: Path) -> None:
    human, mouse = two_species(tmp_path)
    both = join_vectors([human, mouse])
    assert both.keys == [*human.keys, *mouse.keys]
    assert both.vector_GK.shape == (len(both.keys), 5)
    for part, axes, others in ((human, slice(3), slice(3, 5)), (mouse, slice(3, 5), slice(3))):
        own = both.vector_GK[[both.row[k] for k in part.keys]]
        np.testing.assert_array_equal(own[:, others], 0)
        np.testing.assert_allclose(np.square(own).sum(1).mean(), 1, rtol=1e-5)
        np.testing.assert_allclose(own[:, axes] * part.vector_GK.max() / own[:, axes].max(), part.vector_GK, rtol=1e-4)
    np.testing.assert_array_equal(both.moments_G4[both.row[mouse.keys[0]]], mouse.moments_G4[0])
    assert (both.header["licence"], both.header["tissue"]) == ("CC0", "bulb")
    assert [s["species"] for s in both.header["sources"]] == ["human", "mouse"]
    # A section that is among the cells of either file is recognised.
    assert set(both.cells) == {*human.cells, *mouse.cells}
    unknown = replace(mouse, cells=np.zeros(0, np.uint64))
    assert join_vectors([human, unknown]).cells.size == 0


def test_what_is_not_joined(tmp_path: Path) -> None:
    human, mouse = two_species(tmp_path)
    with pytest.raises(ValueError, match=r"28 genes are in two of the files \(human:"):
        join_vectors([human, mouse, human])
    with pytest.raises(ValueError, match="give the others"):
        join_vectors([human])
    with pytest.raises(ValueError, match="of one of the files are 0"):
        join_vectors([human, replace(mouse, vector_GK=0 * mouse.vector_GK)])


def test_the_command_joins_files_of_two_species(tmp_path: Path, capsys) -> None:
    files = [tmp_path / "h.safetensors", tmp_path / "m.safetensors"]
    for vectors, path in zip(two_species(tmp_path), files, strict=True):
        vectors.save(path)
    out = tmp_path / "both.safetensors"
    command = ["genes", "vectors", *map(str, files), "--out", str(out)]
    assert main([*command, "--components", "9"]) == 2
    assert "--components: for counts only" in capsys.readouterr().err
    assert not out.exists()
    assert main(command) == 0
    assert "40 genes x 5 components (28 human, 12 mouse)" in capsys.readouterr().out
    assert GeneVectors.load(out).row["mouse:Krt14"] >= 28


def edit_file(path: Path, change) -> None:
    with safe_open(path, framework="numpy") as file:
        header, arrays = json.loads(file.metadata()["header"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(arrays, header)
    save_file(arrays, path, metadata={"header": json.dumps(header)})


def duplicate_key(arrays: dict[str, np.ndarray], header: dict) -> None:
    keys = arrays["keys"].tobytes().decode().split("\n")
    arrays["keys"] = np.frombuffer("\n".join([keys[1], *keys[1:]]).encode(), np.uint8)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cut", lambda a, h: a.update(moments=a["moments"][:-1].copy()), "moments has .*shape .27, 4., .* 28 genes"),
        ("duplicate", duplicate_key, "1 of 28 gene keys are duplicates"),
        ("nan", lambda a, h: a["vectors"].__setitem__((0, 0), np.nan), "vectors has values that are not finite"),
        ("version", lambda a, h: h.update(version=9), "version 9"),
        ("missing", lambda a, h: a.pop("detection"), "not a file of gene vectors"),
    ],
)
def test_a_file_with_invalid_contents_is_refused(tmp_path: Path, name: str, change, message: str) -> None:
    path = tmp_path / f"{name}.safetensors"
    gene_vectors([write_table(tmp_path / "a.tsv.gz", make_counts(20))], components=2, species="human").save(path)
    edit_file(path, change)
    with pytest.raises(ValueError, match=message):
        GeneVectors.load(path)
