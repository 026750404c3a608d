"""Xenium: transcripts and cells pooled on an H&E image that is rotated and scaled relative to the DAPI image."""

import json
import math
import os
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from comtip_shards import ShardSet, SourceError
from comtip_shards.reader.verify import verify
from comtip_shards.sources import detect, open_source
from comtip_shards.sources.tenx.alignment import read_alignment
from PIL import Image

from comtip_fast.cli import main
from testkit.option_reads import declared, fields_read
from testkit.tenx import GENES, NAMES, he_picture, section_digest, write_xenium

PIXEL = 0.2125
SIZE = (150, 130)
"""Size of the H&E in px. At 2 um per px, 100 um are 50 px: 3 x 2.6 pseudo-spots."""
MPP = 2.0
FACTS = {"tissue": "breast", "donor": "P1"}


def matrix(angle: float = math.pi / 2 + 0.02, scale: float = MPP / PIXEL) -> np.ndarray:
    """Return the matrix from H&E px to DAPI px: a rotation by about 90 degrees, as is common for scanned H&E slides."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return np.array([[c, -s, 900.0], [s, c, 3000.0], [0, 0, 1]])


def to_run(he_px: np.ndarray) -> np.ndarray:
    """Map H&E px to um of the run."""
    m = matrix()
    return (he_px @ m[:2, :2].T + m[:2, 2]) * PIXEL


def transcripts() -> tuple[pd.DataFrame, np.ndarray]:
    """Return a table of 3,000 transcripts with their positions in H&E px, at half-integers so that none is on an edge."""
    rng = np.random.default_rng(0)
    he = np.stack([rng.integers(0, SIZE[0], 3000), rng.integers(0, SIZE[1], 3000)], axis=1) + 0.5
    um = to_run(he)
    names = rng.choice(
        [*NAMES[:3], "NegControlProbe_00001", "BLANK_0007", "antisense_PROK2", "UnassignedCodeword_0003"],
        3000,
        p=[0.4, 0.3, 0.2, 0.04, 0.02, 0.02, 0.02],
    )
    table = pd.DataFrame(
        {
            "feature_name": names,
            "x_location": um[:, 0],
            "y_location": um[:, 1],
            "qv": rng.choice([12.0, 20.0, 40.0], 3000),
            "cell_id": rng.choice([*(f"aaaa{i:04d}-1" for i in range(70)), "UNASSIGNED"], 3000),
        }
    )
    # Cells are small: each takes the transcripts of one position.
    offset = (he // 18).astype(int)
    table["cell_id"] = np.where(
        table["cell_id"] == "UNASSIGNED", "UNASSIGNED", [f"aaaa{j:02d}{i:02d}-1" for i, j in offset]
    )
    return table, he


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = write_xenium(tmp_path / "output_Region_1", transcripts()[0])
    he_picture(*SIZE).save(root / "breast_he_image.ome.tif")
    write_matrix(root)
    return root


def write_matrix(root: Path, values: np.ndarray | None = None) -> Path:
    path = root / "breast_he_imagealignment.csv"
    np.savetxt(path, matrix() if values is None else values, delimiter=",", fmt="%.10g")
    return path


def write_keypoints(root: Path, n: int = 8, noise_um: float = 0.0) -> Path:
    rng = np.random.default_rng(3)
    he = rng.uniform(0, 120, (n, 2))
    dapi = (to_run(he) + rng.normal(scale=noise_um, size=(n, 2)) if noise_um else to_run(he)) / PIXEL
    path = root / "breast_he_imagealignment.csv"
    pd.DataFrame(np.hstack([dapi, he]), columns=["fixedX", "fixedY", "alignmentX", "alignmentY"]).to_csv(
        path, index=False
    )
    return path


def read(run: Path, **more: str):
    return open_source(run, overrides={**FACTS, **more})[0].read()


def truth(qv: float = 20.0, pool_px: float = 50.0) -> dict[str, np.ndarray]:
    """Count transcript by transcript: {id: counts of the four genes}."""
    table, he = transcripts()
    out: dict[str, np.ndarray] = {}
    for row, (x, y) in zip(table.itertuples(), he, strict=True):
        if row.feature_name in NAMES and row.qv >= qv:
            key = f"{int(y // pool_px):03d}x{int(x // pool_px):03d}"
            out.setdefault(key, np.zeros(4, int))[NAMES.index(row.feature_name)] += 1
    return out


def same(section, want: dict[str, np.ndarray], pool_px: float = 50.0) -> None:
    assert section.spot_ids == sorted(want)
    for i, name in enumerate(section.spot_ids):
        np.testing.assert_array_equal(section.counts[i].toarray()[0], want[name])
        row, col = map(int, name.split("x"))
        np.testing.assert_allclose(section.xy[i], [(col + 0.5) * pool_px, (row + 0.5) * pool_px], rtol=1e-5)


@pytest.mark.parametrize("alignment", ["matrix", "keypoints"])
def test_transcripts_are_pooled_where_the_tile_shows_them(run: Path, alignment: str):
    if alignment == "keypoints":
        write_keypoints(run)
    reader, why = detect(run)
    assert (reader.name, why) == ("xenium", "Xenium run with experiment.xenium, transcripts.parquet, cells.parquet")
    section = read(run)
    want = truth()
    assert len(want) == 9
    same(section, want)
    np.testing.assert_array_equal(section.n_pooled, [want[k].sum() for k in section.spot_ids])
    # GAPDH is on the panel and was never seen: its zeros are measured.
    assert section.gene_ids == list(GENES)
    meta = section.meta
    assert (meta.section_id, meta.species, meta.platform) == ("output_Region_1", "human", "Xenium")
    assert (meta.mpp, meta.spot_diameter_um) == (pytest.approx(MPP), 100)
    assert meta.pooling == "transcripts of qv 20 or more in squares of 100 um, at least 5% of a dense one"
    table = transcripts()[0]
    genes = table["feature_name"].isin(NAMES)
    assert f"{(~genes).sum()} transcripts excluded: control probes" in section.notes
    assert f"{(genes & (table['qv'] < 20)).sum()} transcripts excluded: qv below 20" in section.notes
    assert f"{sum(v.sum() for v in want.values()):,} transcripts with qv of at least 20 pooled" in section.notes
    assert any("rotated by 91.1 degrees" in n for n in section.notes)
    assert any(
        ("8 keypoints, root mean square error 0.00 um" in n) == (alignment == "keypoints") for n in section.notes
    )


def test_other_sizes_and_qualities(run: Path):
    same(read(run, qv="40", pool_um="52"), truth(qv=40, pool_px=26), 26)
    same(read(run, qv="10"), truth(qv=10))
    same(read(run, qv="0"), truth(qv=0))
    counts = {k: v.sum() for k, v in truth().items()}
    least = sorted(counts.values())[4]
    section = read(run, min_pooled=str(least))
    assert section.spot_ids == sorted(k for k, n in counts.items() if n >= least)
    assert section.dropped == {f"pseudo-spots with under {least} transcripts": 4}
    lost = sum(sorted(counts.values())[:4])
    assert f"excluded pseudo-spots: {lost} transcripts with {lost} counts" in section.notes


def test_stray_transcripts_on_glass_make_no_spot(run: Path):
    table, _ = transcripts()
    stray = table.iloc[:3].copy()
    um = to_run(np.array([[20.0, 160.0], [70.0, 160.0], [130.0, 160.0]]))
    stray["x_location"], stray["y_location"], stray["qv"], stray["feature_name"] = um[:, 0], um[:, 1], 40.0, "ERBB2"
    write_xenium(run, pd.concat([table, stray]))
    he_picture(150, 200).save(run / "breast_he_image.ome.tif")
    section = read(run)
    assert section.spot_ids == sorted(truth())
    assert sum(section.dropped.values()) == 3
    assert any("excluded pseudo-spots: 3 transcripts with 3 counts" in n for n in section.notes)


def test_cells_are_pooled_by_their_centres(run: Path):
    section = read(run, pool_from="cells")
    cells = pd.read_parquet(run / "cells.parquet").set_index("cell_id")
    with h5py.File(run / "cell_feature_matrix.h5") as file:
        indptr, indices, data = (file[f"matrix/{n}"][()] for n in ("indptr", "indices", "data"))
        names = file["matrix/barcodes"].asstr()[()]
    inverse = np.linalg.inv(matrix())
    want: dict[str, np.ndarray] = {}
    n_cells: dict[str, int] = {}
    for i, name in enumerate(names):
        x, y = (inverse @ [*(cells.loc[name].to_numpy() / PIXEL), 1])[:2]
        key = f"{int(y // 50):03d}x{int(x // 50):03d}"
        n_cells[key] = n_cells.get(key, 0) + 1
        for j in range(indptr[i], indptr[i + 1]):
            if indices[j] < 4:  # the last is a control probe
                want.setdefault(key, np.zeros(4, int))[indices[j]] += data[j]
    same(section, want)
    assert section.n_pooled.tolist() == [n_cells[k] for k in section.spot_ids]
    assert "1 features are not genes: Negative Control Probe" in section.notes
    assert section.meta.pooling == "cells in squares of 100 um, at least 1"
    (run / "transcripts.parquet").unlink()
    assert read(run).meta.pooling.startswith("cells")


def test_pooled_cells_keep_their_bytes(run: Path):
    """The digest is from the separate implementations that the two readers had."""
    table = pd.read_parquet(run / "cells.parquet")
    table.drop(index=[3, 20]).to_parquet(run / "cells.parquet", index=False)
    assert (
        section_digest(read(run, pool_from="cells"))
        == "f3774b674305837eefe50609f0169eec7b3d87a281b0e1d5e192052e8157b338"
    )


def test_cells_that_are_in_one_file_only_are_counted(run: Path):
    table = pd.read_parquet(run / "cells.parquet")
    table.drop(index=[3, 20]).to_parquet(run / "cells.parquet", index=False)
    section = read(run, pool_from="cells")
    assert f"{len(table) - 2} cells pooled" in section.notes
    assert any(n.startswith("2 cells with ") and n.endswith("excluded: not in cells.parquet") for n in section.notes)


def test_round_trip_through_a_shard_set(run: Path, tmp_path: Path):
    # Each pseudo-spot's ground has a shade of its own, so that a tile tells which ground it shows.
    shade = np.arange(9).reshape(3, 3).repeat(50, 0).repeat(50, 1)[: SIZE[1], : SIZE[0]]
    picture = np.stack([120 + 10 * shade, 60 + 12 * shade, 130 + 8 * shade], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(run / "breast_he_image.ome.tif")
    options = ["--tissue", "breast", "--pool-um", "100", "--qv", "20", "--codec", "png"]
    options += ["--tile-px", "25", "--tile-um", "100", "--min-mpp", "2"]
    assert main(["shards", "build", str(run), "--out", str(tmp_path / "s"), *options]) == 0
    assert verify(tmp_path / "s").ok
    shards = ShardSet(tmp_path / "s")
    symbols = [g.symbol for g in shards.genes]
    counts = pd.DataFrame(shards.counts(range(len(shards))).toarray(), columns=symbols)[list(NAMES)].to_numpy()
    want = truth()
    assert sorted(shards.spots["spot_id"]) == sorted(want)
    for spot, row in zip(shards.spots.itertuples(), counts, strict=True):
        np.testing.assert_array_equal(row, want[spot.spot_id])
        assert spot.n_pooled == want[spot.spot_id].sum()
    assert shards.measured(0).all()
    for spot, tile in zip(shards.spots.itertuples(), shards.tiles(range(len(shards))), strict=True):
        row_, col_ = map(int, spot.spot_id.split("x"))
        inner = tile[2:13, 2:-2]  # resampling mixes the edges, and below the last row there is glass
        np.testing.assert_array_equal(inner, np.broadcast_to(picture[row_ * 50, col_ * 50], inner.shape))


def test_batches_do_not_matter(run: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("tenx.pooled", "files.table_batches"):
        monkeypatch.setattr(f"comtip_shards.sources.{module}.BATCH", 13)
    same(read(run), truth())
    few = read(run, pool_from="cells")
    monkeypatch.undo()
    many = read(run, pool_from="cells")
    assert few.spot_ids == many.spot_ids
    np.testing.assert_array_equal(few.counts.toarray(), many.counts.toarray())


@pytest.mark.parametrize("kind", ["gene_panel.json", "names"])
def test_genes_without_the_matrix_of_cells(run: Path, kind: str):
    (run / "cell_feature_matrix.h5").unlink()
    if kind == "gene_panel.json":
        gene = [
            {"type": {"descriptor": "gene", "data": {"id": i, "name": n}}} for i, n in zip(GENES, NAMES, strict=True)
        ]
        control = [{"type": {"descriptor": "negative_control_probe", "data": {"name": "NegControlProbe_00001"}}}]
        (run / "gene_panel.json").write_text(json.dumps({"payload": {"targets": gene + control}}))
    section = read(run)
    if kind == "names":
        assert section.gene_ids == ["CD74", "ERBB2", "KRT14"]
        assert any("undetected genes of the panel are treated as not measured" in n for n in section.notes)
    else:
        same(section, truth())
    assert sum(v.sum() for v in truth().values()) == section.counts.sum()


def test_version_1_writes_names_as_bytes_and_has_no_gene_flag(run: Path):
    table = pd.read_parquet(run / "transcripts.parquet").drop(columns="is_gene")
    table["feature_name"] = [n.encode() for n in table["feature_name"]]
    table.to_parquet(run / "transcripts.parquet", index=False)
    same(read(run), truth())


@pytest.mark.parametrize("axes", ["YXS", "SYX", "QYXS"])
def test_axes_of_the_he_image(run: Path, axes: str):
    rgb = np.asarray(he_picture(*SIZE))
    shaped = {"YXS": rgb, "SYX": np.moveaxis(rgb, -1, 0), "QYXS": rgb[None]}[axes]
    tifffile.imwrite(run / "breast_he_image.ome.tif", shaped, photometric="rgb", metadata={"axes": axes})
    section = read(run)
    same(section, truth())
    np.testing.assert_array_equal(section.load_image(), rgb)


# -- alignment --------------------------------------------------------------------------------------------------


def test_keypoints_say_how_far_apart_they_stay(run: Path):
    path = write_keypoints(run, n=40, noise_um=5.0)
    fit = read_alignment(path, PIXEL)
    table = pd.read_csv(path).to_numpy()
    mapped = np.column_stack([table[:, 2:], np.ones(40)]) @ fit.matrix_33[:2].T
    apart = np.linalg.norm(mapped - table[:, :2], axis=1) * PIXEL
    rms = np.sqrt((apart**2).mean())
    assert 4 < rms < 10  # 5 um in x and in y
    assert f"40 keypoints, root mean square error {rms:.2f} um, maximum {apart.max():.2f} um" in fit.notes[0]
    np.testing.assert_allclose(fit.to_image(mapped), table[:, 2:])
    assert fit.scale() * PIXEL == pytest.approx(MPP, rel=0.03)
    assert "the error is unknown" in read_alignment(write_keypoints(run, n=3), PIXEL).notes[0]


def one_wrong(root: Path) -> None:
    path = write_keypoints(root)
    table = pd.read_csv(path)
    table.loc[4, "fixedX"] += 2000
    table.to_csv(path, index=False)


BAD_ALIGNMENT = {
    "gone": (
        lambda r: (r / "breast_he_imagealignment.csv").unlink(),
        "no alignment of breast_he_image.ome.tif.*`alignment`",
    ),
    "one wrong": (one_wrong, r"root mean square error of \d+\.\d+ um.*at keypoint 5"),
    "two points": (lambda r: write_keypoints(r, n=2), "2 keypoints, too few; select at least three"),
    "other columns": (lambda r: (r / "breast_he_imagealignment.csv").write_text("a,b\n1,2\n"), "expected fixedX"),
    "text": (
        lambda r: (r / "breast_he_imagealignment.csv").write_text("1,2,3\n4,x5y,6\n0,0,1\n"),
        "cannot be read as a matrix of 3 x 3",
    ),
    "2 x 3": (lambda r: write_matrix(r, matrix()[:2]), "the matrix is 2 x 3, expected 3 x 3"),
    "a missing value": (
        lambda r: write_matrix(r, matrix() * [[1, 1, 1], [np.nan, 1, 1], [1, 1, 1]]),
        "values that are not finite",
    ),
    "projective": (lambda r: write_matrix(r, matrix() + [[0, 0, 0], [0, 0, 0], [1e-3, 0, 0]]), "not affine"),
    "stretched": (
        lambda r: write_matrix(r, matrix() * [[1, 1.5, 1], [1, 1.5, 1], [1, 1, 1]]),
        "scales of the two axes",
    ),
    "flat": (lambda r: write_matrix(r, matrix() * [[0, 0, 1], [0, 0, 1], [1, 1, 1]]), "scales of the two axes"),
    "elsewhere": (lambda r: write_matrix(r, matrix() + [[0, 0, 9e4], [0, 0, 0], [0, 0, 0]]), "outside the H&E"),
    "inverted": (lambda r: write_matrix(r, np.linalg.inv(matrix())), "a matrix from H&E px to DAPI px"),
    "endless": (
        lambda r: os.truncate(write_matrix(r), 1 << 30),
        r"alignment\.csv: 1,073,741,824 bytes, too large .* 3 x 3 numbers",
    ),
}


@pytest.mark.parametrize("name", BAD_ALIGNMENT)
def test_a_bad_alignment_names_the_file_and_the_fix(run: Path, name: str):
    change, message = BAD_ALIGNMENT[name]
    change(run)
    with pytest.raises(SourceError, match=message):
        read(run)


def test_the_scale_of_the_image_is_checked(run: Path):
    def tag(um: float) -> None:
        per_cm = (1e4 / um, 1e4 / um)
        tifffile.imwrite(
            run / "breast_he_image.ome.tif",
            np.asarray(he_picture(*SIZE)),
            photometric="rgb",
            resolution=per_cm,
            resolutionunit="CENTIMETER",
            ome=False,
        )

    tag(MPP)
    same(read(run), truth())
    tag(0.5)
    with pytest.raises(
        SourceError, match=r"gives 2\.0000 um per H&E px, but .*he_image\.ome\.tif states 0\.5; .*`mpp` to 2\.0000"
    ):
        read(run)
    same(read(run, mpp="2.0"), truth())
    # The other way round, a px of 0.5 um comes out as 0.2125 ** 2 / 0.5.
    write_matrix(run, np.linalg.inv(matrix(scale=0.5 / PIXEL)))
    with pytest.raises(SourceError, match="the matrix maps DAPI px to H&E px"):
        read(run)


# -- what is wrong ----------------------------------------------------------------------------------------------


def edit_transcripts(**changes):
    def change(run: Path) -> None:
        table = pd.read_parquet(run / "transcripts.parquet")
        for column, value in changes.items():
            table[column] = value
        table.to_parquet(run / "transcripts.parquet", index=False)

    return change


def edit_experiment(**changes):
    def change(run: Path) -> None:
        path = run / "experiment.xenium"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut(name: str):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:900])


BAD = {
    "no image": (lambda r: (r / "breast_he_image.ome.tif").unlink(), "no H&E image .*`image`"),
    "two images": (lambda r: he_picture(9, 9).save(r / "b_he_image.ome.tif"), "more than one H&E image"),
    "pixel size gone": (edit_experiment(pixel_size=None), "pixel_size is None, .* 0.2125"),
    "pixel size absurd": (edit_experiment(pixel_size=212.5), "pixel_size is 212.5"),
    "pixel size is text": (edit_experiment(pixel_size="small"), "not a number"),
    "experiment cut": (lambda r: (r / "experiment.xenium").write_text("{"), "not valid JSON"),
    "low quality": (edit_transcripts(qv=3.0), r"no transcript is left \(.*qv below 20.*reduce `qv`"),
    "only controls": (edit_transcripts(feature_name="BLANK_0001"), r"no transcript is left \(3,000 .*control probes"),
    "other genes": (edit_transcripts(feature_name="TTN", is_gene=True), "not in the panel"),
    "no positions": (edit_transcripts(x_location=np.nan), "no position"),
    "position is text": (edit_transcripts(x_location="here"), "x_location has type string"),
    "flag is binary": (edit_transcripts(is_gene=b"yes"), "column is_gene is binary, not true and false"),
    "not um": (edit_transcripts(x_location=1e15), "check the positions, their unit and the scale"),
    "column gone": (
        lambda r: pd.read_parquet(r / "transcripts.parquet").drop(columns="qv").to_parquet(r / "transcripts.parquet"),
        "missing columns qv",
    ),
    "cut": (cut("transcripts.parquet"), "transcripts.parquet: cannot be read as Parquet"),
    "nothing to pool": (
        lambda r: [(r / n).unlink() for n in ("transcripts.parquet", "cell_feature_matrix.h5")],
        "neither transcripts.parquet",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_file_and_the_fix(run: Path, name: str):
    change, message = BAD[name]
    change(run)
    with pytest.raises(SourceError, match=message):
        read(run)


def rename_cells(run: Path) -> None:
    table = pd.read_parquet(run / "cells.parquet")
    table["cell_id"] = [f"other{i}" for i in range(len(table))]
    table.to_parquet(run / "cells.parquet")


BAD_CELLS = {
    "no join": (rename_cells, "only 0 of its .* cells are in"),
    "no counts": (lambda r: (r / "cell_feature_matrix.h5").unlink(), "no cell_feature_matrix.h5"),
    "no cells": (lambda r: (r / "cells.parquet").unlink(), "cells.parquet: no such file"),
    "qv": (lambda r: None, "`qv` has no effect here"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_bad_cells_name_the_file_and_the_fix(run: Path, name: str):
    change, message = BAD_CELLS[name]
    change(run)
    with pytest.raises(SourceError, match=message):
        read(run, pool_from="cells", **({"qv": "30"} if name == "qv" else {}))


def test_version_1_numbers_its_cells(run: Path):
    before = read(run, pool_from="cells")
    table = pd.read_parquet(run / "cells.parquet")
    number = {name: i + 1 for i, name in enumerate(table["cell_id"])}
    table.assign(cell_id=table["cell_id"].map(number)).to_parquet(run / "cells.parquet", index=False)
    with h5py.File(run / "cell_feature_matrix.h5", "r+") as file:
        names = [str(number[n]) for n in file["matrix/barcodes"].asstr()[()]]
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = np.array(names, "S")
    np.testing.assert_array_equal(read(run, pool_from="cells").counts.toarray(), before.counts.toarray())


def test_image_and_alignment_may_lie_elsewhere(run: Path, tmp_path: Path):
    for name in ("breast_he_image.ome.tif", "breast_he_imagealignment.csv"):
        (run / name).rename(tmp_path / name)
    same(read(run, image=str(tmp_path / "breast_he_image.ome.tif")), truth())
    (tmp_path / "breast_he_imagealignment.csv").rename(tmp_path / "mine.csv")
    stated = {"image": str(tmp_path / "breast_he_image.ome.tif"), "alignment": str(tmp_path / "mine.csv")}
    same(read(run, **stated), truth())


def test_species_and_tissue(run: Path):
    edit_experiment(panel_organism="Zebrafish")(run)
    assert read(run).meta.species == "human"  # by its Ensembl ids
    with pytest.raises(
        SourceError, match=r"stated as mouse, but gene ids such as ENSG.* are of human; set `species` to human"
    ):
        read(run, species="mouse")
    with pytest.raises(SourceError, match="set `tissue`"):
        open_source(run)


def test_every_declared_option_is_read(run: Path):
    read = fields_read(run, **FACTS) | fields_read(run, pool_from="cells", **FACTS)
    assert read == declared(run) - {"bin_um", "min_cover"}  # refused by name
