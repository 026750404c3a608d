"""Prediction of slides without spots: tissue, grid, pieces that survive a kill, answers and drawings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
from comtip_shards import ShardSet, SourceError
from comtip_shards.names import problem_with
from comtip_shards.sources import open_source
from PIL import Image
from scipy import ndimage

from comtip_fast.api import GridOptions, Model, load
from comtip_fast.cli import main
from comtip_fast.cli.predict import _output_names
from comtip_fast.data.sections import TileGeometry
from comtip_fast.inference import Predictor
from comtip_fast.slide_prediction import fit_tiles, pieces, run
from comtip_fast.slide_prediction.drawings import _figure, overlay_names, write_overlays
from comtip_fast.slide_prediction.grid import tissue_grid
from comtip_fast.slide_prediction.pieces import Pieces
from comtip_fast.slide_prediction.tissue import tissue_mask

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data_shards" / "samples"
MPP = 5.0
GENES = ["ERBB2", "KRT14", "TTN"]


def tissue_picture(height: int, width: int, *, tissue=(190, 120, 175), glass=(240, 240, 240), seed=0, full=False):
    """Return a picture of a lobed piece of tissue with cells, and where it is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    angle = np.arctan2(y - height / 2, x - width / 2)
    radius = np.hypot((y - height / 2) / height, (x - width / 2) / width)
    where = np.ones((height, width), bool) if full else radius < 0.3 + 0.05 * np.sin(5 * angle)
    cells = ndimage.gaussian_filter(rng.normal(size=(height, width)), 1.5)
    cells /= cells.std()
    stain = np.asarray(tissue) + cells[..., None] * 0.12 * (250 - np.asarray(tissue))
    picture = np.where(where[..., None], stain, np.asarray(glass) + rng.normal(scale=1.5, size=(height, width, 1)))
    return np.clip(picture, 0, 255).astype(np.uint8), where


def agreement(mask: np.ndarray, where: np.ndarray) -> tuple[float, float]:
    """Return the share of tissue that is found, and the share of the rest that is called tissue."""
    return float(mask[where].mean()), float(mask[~where].mean()) if (~where).any() else 0.0


PICTURES = {
    "plain": {},
    "glass that is not white": {"glass": (205, 200, 196)},
    "underexposed": {"tissue": (95, 60, 88), "glass": (140, 138, 136)},
    "pale": {"tissue": (228, 205, 222), "glass": (244, 243, 243)},
    "blue haematoxylin only": {"tissue": (150, 150, 195)},
    "brown antibody stain": {"tissue": (165, 125, 85)},
    "eosin": {"tissue": (235, 150, 190)},
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("mpp", [4.0, 16.0])
def test_tissue_is_distinguished_from_glass(name: str, mpp: float):
    picture, where = tissue_picture(300, 400, **PICTURES[name])
    edge = ndimage.binary_dilation(where, iterations=10) & ~ndimage.binary_erosion(where, iterations=10)
    found, false = agreement(tissue_mask(picture, mpp) | edge, where | edge)
    assert found > 0.97
    assert false < 0.02


@pytest.mark.parametrize("tissue", [(125, 95, 125), (110, 70, 105), (190, 120, 175), (215, 170, 200), (150, 140, 190)])
def test_a_picture_full_of_tissue_is_all_tissue_however_dim_it_is(tissue: tuple[int, int, int]):
    picture, where = tissue_picture(300, 400, tissue=tissue, full=True)
    assert agreement(tissue_mask(picture, 8.0), where)[0] > 0.97


def test_glass_borders_and_frames_are_no_tissue():
    blank = np.full((200, 300, 3), 243, np.uint8)
    assert tissue_mask(blank, 8.0).mean() == 0
    noisy = np.clip(blank + np.random.default_rng(0).normal(scale=3, size=blank.shape), 0, 255).astype(np.uint8)
    assert tissue_mask(noisy, 8.0).mean() < 0.01
    assert not tissue_mask(np.zeros((50, 60, 3), np.uint8), 8.0).any()
    picture, where = tissue_picture(300, 400)
    picture[:30], picture[:, :40] = 0, 0  # missing tiles of a scan are black
    picture[270:280, 60:380] = 70  # a grey frame on the glass
    mask = tissue_mask(picture, 8.0)
    assert not mask[:25].any()
    assert mask[268:282, 100:300].mean() < 0.02
    assert agreement(mask, ndimage.binary_erosion(where, iterations=8))[0] > 0.97


@pytest.mark.parametrize("name", ["her2st_A1", "mob_Rep9"])
def test_spots_on_real_tissue_are_on_the_grid(name: str):
    section = open_source(SAMPLES, samples=[name])[0].read_spots()
    with section.open_slide() as slide:
        picture, factor = slide.overview(run.MASK_PX)
    mask = tissue_mask(picture, section.meta.mpp * factor)
    x, y = (section.xy / factor).astype(int).T
    inside = mask[y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1)]
    assert inside.mean() > 0.93
    assert mask.mean() < 0.9


@pytest.mark.parametrize("shape", ["square", "hexagonal"])
@pytest.mark.parametrize(
    ("size", "centres"),
    [((60, 40), [[30, 20]]), ((250, 40), [[50, 20], [150, 20]]), ((60, 260), [[30, 50], [30, 150]])],
)
def test_a_side_shorter_than_a_step_has_its_tile_in_the_middle(
    shape: str, size: tuple[int, int], centres: list[list[int]]
):
    mask = np.ones((size[1], size[0]), bool)
    grid = tissue_grid(mask, size, 0.5, 50.0, GridOptions(shape=shape, min_tissue=0.2))
    np.testing.assert_allclose(grid.xy_N2[0], centres[0], atol=7)  # rows of a hexagonal lattice are nearer
    if shape == "square":
        np.testing.assert_allclose(grid.xy_N2[: len(centres)], centres)
    np.testing.assert_allclose(grid.tissue_N[0], min(size[0], 100) * min(size[1], 100) / 100**2, atol=0.15)


def test_the_grid_has_the_step_the_shape_and_the_share_of_tissue_that_were_asked():
    mask = np.zeros((100, 200), bool)
    mask[:, 100:] = True  # the right half of a slide of 2000 x 1000 px
    one = tissue_grid(mask, (2000, 1000), 0.5, 50.0, GridOptions())
    assert one.xy_N2.shape == (100, 2)
    np.testing.assert_allclose(one.xy_N2[0], [1050, 50])
    np.testing.assert_allclose(one.tissue_N, 1.0, atol=1e-5)
    np.testing.assert_array_equal(one.array_N2[-1], [19, 9])
    half = tissue_grid(mask, (2000, 1000), 0.5, 50.0, GridOptions(step_um=25.0, min_tissue=0.5))
    assert half.xy_N2[0].tolist() == [1025, 25]  # reaches over the upper edge: half of its tissue is outside
    assert half.tissue_N.min() >= 0.5
    hexagonal = tissue_grid(mask, (2000, 1000), 0.5, 50.0, GridOptions(shape="hexagonal", min_tissue=0))
    rows = [hexagonal.xy_N2[hexagonal.array_N2[:, 1] == r] for r in (0, 1)]
    np.testing.assert_allclose(np.diff(rows[0][:, 0]), 100)
    np.testing.assert_allclose(rows[1][0] - rows[0][0], [50, 100 * 3**0.5 / 2])
    every = tissue_grid(mask, (2000, 1000), 0.5, 50.0, GridOptions(min_tissue=0))
    assert len(every.xy_N2) == 200
    with pytest.raises(
        ValueError, match=r"tiles every 1 um at 0\.5 um per px would be .* at most 20,000,000 .*set a larger `step_um`"
    ):
        tissue_grid(mask, (10**6, 10**6), 0.5, 50.0, GridOptions(step_um=1.0))
    for wrong in (-1, "100"):
        with pytest.raises(ValueError, match=f"`step_um` {wrong!r}: not a positive number"):
            GridOptions(step_um=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`min_tissue` '1': not a share"):
        GridOptions(min_tissue="1")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "slide one.tif"
    picture, _ = tissue_picture(900, 1200, seed=3)
    Image.fromarray(picture).save(path, compression="tiff_deflate")
    return path


@pytest.fixture(scope="module")
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "PIECE_TILES", 30)
        patch.setattr(run, "PIECE_BYTES", 1)
        yield


@pytest.fixture(scope="module")
def whole(small_pieces: None, quick: Path, slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an answer that was predicted without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "whole.h5ad"
    assert predict(quick, slide, out) == 0
    return out


def predict(quick: Path, slide: Path, out: Path, *more: str) -> int:
    arguments = ["predict", str(quick), str(slide), "--genes", *GENES, "--mpp", f"{MPP}", "--species", "human"]
    return main([*arguments, "--device", "cpu", "--out", str(out), *more])


def test_an_answer_is_what_predicting_the_same_tiles_as_a_section_gives(quick: Path, slide: Path, tmp_path: Path):
    assert predict(quick, slide, tmp_path / "x.h5ad", "--grid", "hexagonal", "--donor", "P7") == 0
    answer = ad.read_h5ad(tmp_path / "x.h5ad")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.h5ad"]
    assert answer.n_obs > 100
    assert answer.var_names.tolist() == GENES
    assert answer.uns["comtip"]["donor"] == "P7"
    assert float(answer.uns["comtip"]["mpp"]) == MPP
    section = ad.AnnData(obs=answer.obs.copy(), obsm={"spatial": answer.obsm["spatial"].copy()})
    section.var_names = section.var_names
    model = load(quick, "cpu")
    facts = {"mpp": MPP, "species": "human", "image": str(slide)}
    again = model.predict(section, GENES, facts=facts)
    # The section's stain statistics are of all tiles, as here: the slide has fewer than are sampled.
    assert answer.n_obs <= run.STAIN_TILES
    for layer in ("log1p_cp10k", "log1p_raw"):
        np.testing.assert_allclose(answer.layers[layer], again.layers[layer], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(answer.X, answer.layers["log1p_cp10k"])


def test_scanpy_draws_the_answer(quick: Path, slide: Path, tmp_path: Path):
    scanpy = pytest.importorskip("scanpy")
    predict(quick, slide, tmp_path / "x.h5ad")
    answer = ad.read_h5ad(tmp_path / "x.h5ad")
    library = answer.uns["spatial"]["slide one"]
    height, width = library["images"]["hires"].shape[:2]
    reach = answer.obsm["spatial"] * library["scalefactors"]["tissue_hires_scalef"]
    assert (reach >= 0).all()
    assert (reach[:, 0].max() < width, reach[:, 1].max() < height) == (True, True)
    # Tiles are on tissue in the picture, too.
    x, y = reach.astype(int).T
    assert np.median(library["images"]["hires"][y, x].mean(-1)) < 200
    scanpy.pl.spatial(answer, color="ERBB2", show=False)


KILLED = """
import os, signal, sys
from pathlib import Path
from comtip_fast.slide_prediction import pieces, run
run.PIECE_TILES, run.PIECE_BYTES = 30, 1
left, plain = int(sys.argv[1]), pieces.Pieces.write
def write(self, name, values):
    global left
    if left == 0:
        (self.folder / f".{name}.npy.writing").write_bytes(b"half of a piece")
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    plain(self, name, values)
pieces.Pieces.write = write
from comtip_fast.cli import main
from comtip_fast.cli.predict import _output_names
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("finished", [0, 2, 6])
def test_a_killed_prediction_continues_and_has_the_same_bytes(
    quick: Path, slide: Path, whole: Path, tmp_path: Path, finished: int, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "x.h5ad"
    arguments = ["predict", str(quick), str(slide), "--genes", *GENES, "--mpp", f"{MPP}", "--species", "human"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(finished), *arguments, "--device", "cpu", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not out.exists()
    parts = tmp_path / ".x.h5ad.parts"
    assert len(list(parts.glob("*.npy"))) == finished
    written: list[str] = []
    plain = Pieces.write
    monkeypatch.setattr(Pieces, "write", lambda self, name, v: (written.append(name), plain(self, name, v)))
    assert predict(quick, slide, out) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()
    n = ad.read_h5ad(out).n_obs
    assert len(written) == -(-n // 30) + -(-n // 64) - finished


def test_pieces_of_other_settings_are_not_used_and_a_complete_answer_is_kept(
    quick: Path,
    slide: Path,
    whole: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    caplog.set_level("INFO")
    out = tmp_path / "x.h5ad"
    with monkeypatch.context() as patch:
        patch.setattr(run, "_join", lambda *_: (_ for _ in ()).throw(ValueError("stopped")))
        assert predict(quick, slide, out, "--min-tissue", "0.9") == 2
    assert predict(quick, slide, out) == 0
    assert any("computed for another slide or model, or with other settings" in m for m in caplog.messages)
    assert out.read_bytes() == whole.read_bytes()
    stamp = out.stat().st_mtime_ns
    assert predict(quick, slide, out) == 0
    assert out.stat().st_mtime_ns == stamp
    assert any("already complete" in m for m in caplog.messages)


def test_two_processes_do_not_work_on_one_output(tmp_path: Path):
    with (
        Pieces(tmp_path / "x.h5ad", {"a": 1}),
        pytest.raises(FileExistsError, match="in use by another process that writes the same output"),
        Pieces(tmp_path / "x.h5ad", {}),
    ):
        pass
    (tmp_path / ".y.h5ad.parts").mkdir()
    (tmp_path / ".y.h5ad.parts" / "mine.txt").write_text("x")
    with (
        pytest.raises(FileExistsError, match="contains files that do not belong to a prediction"),
        Pieces(tmp_path / "y.h5ad", {}),
    ):
        pass
    assert (tmp_path / ".y.h5ad.parts" / "mine.txt").exists()


def test_overlays_and_geojson(quick: Path, slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "x.h5ad"
    assert predict(quick, slide, out, "--overlays", "ERBB2", "TTN", "--geojson") == 0
    answer = ad.read_h5ad(out)
    assert sorted(p.name for p in (tmp_path / "x.overlays").iterdir()) == ["ERBB2.png", "TTN.png"]
    with Image.open(tmp_path / "x.overlays" / "ERBB2.png") as image:
        assert image.size[0] > 500
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    found = json.loads((tmp_path / "x.geojson").read_text())
    assert found["type"] == "FeatureCollection"
    assert len(found["features"]) == answer.n_obs
    for i in (0, answer.n_obs - 1):
        feature = found["features"][i]
        corners = np.array(feature["geometry"]["coordinates"][0])
        assert feature["properties"]["objectType"] == "tile"
        np.testing.assert_allclose(corners[:4].mean(0), answer.obsm["spatial"][i], atol=0.01)
        np.testing.assert_allclose(np.ptp(corners, axis=0) * MPP, 224.0, atol=0.1)
        assert corners[0].tolist() == corners[4].tolist()
        values = feature["properties"]["measurements"]
        np.testing.assert_allclose([values[g] for g in GENES], answer.X[i], atol=1e-5)
    capsys.readouterr()
    assert predict(quick, slide, out, "--overlays", "CD74") == 2
    assert "not predicted: CD74; name all genes to predict in --genes, including these" in capsys.readouterr().err


def test_every_gene_has_an_overlay_of_its_own_on_every_file_system():
    names = overlay_names(
        ["ERBB2", "HLA-A", "hla-a", "HLA_A", "a/b", "a_b", "a:b", "..", ".x", "CON", "aux.1", "A.", "é", "x" * 300]
    )
    assert names["ERBB2"] == "ERBB2.png"
    assert names["HLA_A"] == "HLA_A.png"
    assert len({name.casefold() for name in names.values()}) == len(names)
    assert [problem_with(name.lstrip("_-")) for name in names.values()] == [""] * len(names)
    assert max(map(len, names.values())) < 130
    assert names == overlay_names(list(names))
    assert overlay_names(["HLA-A", "HLA-A"]) == {"HLA-A": "HLA-A.png"}


def test_overlays_of_genes_that_differ_in_case_or_are_formulas(tmp_path: Path):
    genes = ["Actb", "ACTB", "$\\frac{$", "n" * 400]
    answer = SimpleNamespace(
        image=np.full((20, 30, 3), 200, np.uint8),
        scale=1.0,
        mpp=2.0,
        tile_px=10.0,
        xy_N2=np.array([[5.0, 5.0], [15, 5]]),
        columns=lambda wanted: [genes.index(g) for g in wanted],
        rows=lambda columns: [(0, np.array([[0.0], [1.0 + columns[0]]], np.float32))],
    )
    written = write_overlays(answer, genes, tmp_path / "overlays")
    assert len(set(written)) == len(list((tmp_path / "overlays").iterdir())) == 4


def test_an_overlay_has_a_scale_bar():
    owner = np.zeros((20, 300), np.int32)
    axes = _figure(np.full((20, 300, 3), 200, np.uint8), owner, np.ones(1), "CD74", 12.0).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1,000 µm"]
    assert np.ptp(axes.lines[-1].get_xdata()) * 12.0 == pytest.approx(1000)
    assert axes.get_xlim() == (-0.5, 299.5)


@pytest.mark.parametrize("length", [241, 255, 256])
def test_a_name_too_long_for_the_files_next_to_it_is_refused_before_the_prediction(
    length: int, quick: Path, slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / ("x" * (length - 5) + ".h5ad")
    assert predict(quick, slide, out, "--overlays", "ERBB2") == 2
    assert "give a shorter name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("drawing", ["--overlays", "--geojson"])
def test_genes_to_draw_are_checked_before_the_prediction(
    drawing: str, quick: Path, slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert predict(quick, slide, tmp_path / "x.h5ad", drawing, "ERBB2,CD74") == 2
    assert (
        f"{drawing}: not predicted: CD74; name all genes to predict in --genes, including these"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("*.h5ad")) + list(tmp_path.glob(".*.parts"))


def test_predictions_next_to_the_slides_are_no_source(quick: Path, slide: Path, tmp_path: Path):
    """A folder of slides as --out: the command resumes, although the folder now also holds AnnData files."""
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / slide.name).write_bytes(slide.read_bytes())
    assert predict(quick, slides, slides) == 0
    assert predict(quick, slides, slides) == 0
    answer = ad.read_h5ad(slides / f"{slide.stem}.h5ad")
    del answer.uns["comtip"]
    answer.write_h5ad(slides / "section.h5ad")
    assert predict(quick, slides, slides) == 2


def test_a_folder_of_slides_is_predicted_and_a_bad_one_does_not_stop_the_others(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    slides = tmp_path / "slides"
    slides.mkdir()
    picture, _ = tissue_picture(400, 500)
    Image.fromarray(picture).save(slides / "a.png")
    (slides / "b.tif").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    Image.fromarray(np.full((300, 300, 3), 243, np.uint8)).save(slides / "blank.png")
    Image.fromarray(picture[::-1]).save(slides / "c.tif")
    Image.fromarray(picture).save(slides / "._a.png", format="png")
    (slides / "notes.txt").write_text("x")
    assert predict(quick, slides, tmp_path / "out") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == ["a.h5ad", "c.h5ad"]
    assert "2 of 4 slides failed: b.tif, blank.png" in caplog.text
    assert "Git LFS" in caplog.text
    assert "lower `min_tissue`, or set it to 0 to predict the complete image" in caplog.text
    assert predict(quick, tmp_path / "out", tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert "not a folder of slides" in error or "no image or whole-slide file" in error
    (tmp_path / "file").write_text("x")
    assert predict(quick, slides, tmp_path / "file") == 2
    assert "is a folder of slides; give a folder" in capsys.readouterr().err


def test_every_slide_of_a_folder_has_an_output_of_its_own():
    slides = [Path("a.png"), Path("a.tif"), Path("a.tif.png"), Path("b.svs")]
    assert set(_output_names(slides[:2] + slides[3:]).values()) == {"a.png", "a.tif", "b"}
    assert len(set(_output_names(slides).values())) == 4


@pytest.mark.parametrize("size", [3 << 20, 80 << 20])
def test_a_change_inside_a_slide_changes_its_hash(tmp_path: Path, size: int):
    """Scans begin and end with glass, so the ends of two versions of a file may be equal."""
    path = tmp_path / "a.tif"
    path.write_bytes(bytes(size))
    before = run._content(path)
    with path.open("r+b") as file:
        file.seek(size // 2 - (1 << 19))
        file.write(b"\1" * (1 << 20))
    assert run._content(path) != before


def test_the_pixels_of_a_mirax_slide_are_in_its_hash(tmp_path: Path):
    (tmp_path / "a.mrxs").write_bytes(b"thumbnail")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Data0000.dat").write_bytes(b"1")
    before = run._content(tmp_path / "a.mrxs")
    (tmp_path / "a" / "Data0000.dat").write_bytes(b"2")
    assert run._content(tmp_path / "a.mrxs") != before


def test_a_folder_of_sections_is_not_taken_for_slides(
    quick: Path, tiny_source: Path, tiny_shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shards = Path(str(tiny_shards.path))
    for folder, kind in ((tiny_source, "sections of format manifest"), (shards, "a shard set")):
        assert predict(quick, folder, tmp_path / "out") == 2
        assert f"{folder}: {kind}, not a folder of slides" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"x: the output is an AnnData file; give a name that ends in \.h5ad"):
        load(quick, "cpu").predict_slide(tiny_source / "x1.png", ["ERBB2"], facts={"mpp": 5}, out=tmp_path / "x")


def test_options_are_honoured_or_refused(quick: Path, slide: Path, tiny_shards: ShardSet, tmp_path: Path, capsys):
    for option in (
        ["--pool-um", "10"],
        ["--layer", "X"],
        ["--image", "x.png"],
        ["--format", "hest"],
        ["--pixels", "wsi"],
    ):
        assert predict(quick, slide, tmp_path / "x.h5ad", *option) == 2
        assert f"{option[0]} has no effect here" in capsys.readouterr().err
    section = f"{tiny_shards.path}:x1"
    for option in (["--grid", "square"], ["--step-um", "9"], ["--min-tissue", "0"], ["--overlays", "A"], ["--geojson"]):
        assert main(["predict", str(quick), section, "--out", str(tmp_path / "x.h5ad"), *option]) == 2
        assert f"{option[0]} has no effect here: used for slides without spots only" in capsys.readouterr().err
    arguments = ["predict", str(quick), str(slide), "--out", str(tmp_path / "x.h5ad")]
    assert main(arguments) == 2
    assert "the file states no resolution; set --mpp" in capsys.readouterr().err
    assert main([*arguments, "--mpp", "5000"]) == 2
    assert "5000 um per px is not plausible" in capsys.readouterr().err
    assert main([*arguments, "--mpp", "5", "--step-um", "0"]) == 2
    assert "--step-um 0" in capsys.readouterr().err
    assert list(tmp_path.glob("x*")) == []


def test_the_scale_of_the_file_is_used_and_a_stated_one_takes_precedence(
    quick: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    picture, _ = tissue_picture(400, 500)
    dpi = 25_400 / MPP
    Image.fromarray(picture).save(tmp_path / "a.tif", dpi=(dpi, dpi))
    model = load(quick, "cpu")
    own = model.predict_slide(tmp_path / "a.tif", ["ERBB2"])
    assert float(own.uns["comtip"]["mpp"]) == pytest.approx(MPP)
    other = model.predict_slide(tmp_path / "a.tif", ["ERBB2"], facts={"mpp": 10.0})
    assert other.n_obs > 2 * own.n_obs
    assert "`mpp` 10 is used, but the file states 5 um per px" in caplog.text
    for wrong in (MPP / 10, MPP * 10):
        with pytest.raises(SourceError, match=r"a\.tif: `mpp` .* times the 5 um per px that the file states"):
            model.predict_slide(tmp_path / "a.tif", ["ERBB2"], facts={"mpp": wrong})
    trusted = model.predict_slide(tmp_path / "a.tif", ["ERBB2"], facts={"mpp": MPP * 10, "trust_mpp": True})
    assert float(trusted.uns["comtip"]["mpp"]) == pytest.approx(MPP * 10)


def test_a_slide_of_another_stain_is_predicted_with_a_warning(
    quick: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for name, tissue, warned in (("brown", (165, 125, 85), True), ("he", (190, 120, 175), False)):
        caplog.clear()
        Image.fromarray(tissue_picture(300, 400, tissue=tissue)[0]).save(tmp_path / f"{name}.png")
        load(quick, "cpu").predict_slide(tmp_path / f"{name}.png", ["ERBB2"], facts={"mpp": MPP})
        assert ("may not be H&E" in caplog.text) == warned


def test_tiles_in_memory_are_those_of_the_section(quick: Path, tiny_shards: ShardSet):
    model = load(quick, "cpu")
    number = tiny_shards.section_number("x1")
    spots = tiny_shards.source_order(number)
    xy = tiny_shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)
    own = model.predict_tiles(tiny_shards.tiles(spots), 224 / 32, GENES, xy=xy, stain=tiny_shards.stain(number))
    section = model.predict(f"{tiny_shards.path}:x1", GENES)
    np.testing.assert_allclose(own.X, section.X, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(own.layers["log1p_raw"], section.layers["log1p_raw"], rtol=1e-5, atol=1e-5)
    assert own.var.equals(section.var)
    assert model.predict_tiles(tiny_shards.tiles(spots[:0]), 7.0, GENES).shape == (0, 3)


def test_larger_and_finer_tiles_are_brought_to_the_size_of_the_model():
    tile = TileGeometry(32, 64.0, 1.0)
    y, x = np.mgrid[0:256, 0:256]
    big = np.stack([x, y, np.full(x.shape, 90)], axis=-1).astype(np.uint8)[None]  # 128 um at 0.5 um per px
    out = fit_tiles(big, 0.5, tile)[0].astype(float)
    assert out.shape == (32, 32, 3)
    np.testing.assert_allclose(out[0, 0, :2], [65.5, 65.5], atol=1.5)  # the centre: px 64 to 192
    np.testing.assert_allclose(out[-1, -1, :2], [189.5, 189.5], atol=1.5)
    assert (out[..., 2] == 90).all()  # no white from beyond the edge
    exact = fit_tiles(big[:, :128, :128], 0.5, tile)[0].astype(float)
    np.testing.assert_allclose(exact[0, 0, :2], [1.5, 1.5], atol=1.5)
    same = np.zeros((2, 32, 32, 3), np.uint8)
    assert fit_tiles(same, 2.0, tile) is same


@pytest.mark.parametrize(
    ("tiles", "mpp", "error", "message"),
    [
        (np.zeros((2, 64, 64, 3)), 3.5, TypeError, "dtype float64; convert to uint8"),
        (np.zeros((64, 64, 3), np.uint8), 3.5, ValueError, r"expected square RGB tiles \(N, H, H, 3\)"),
        (np.zeros((2, 3, 64, 64), np.uint8), 3.5, ValueError, "transpose channels to the end"),
        (np.zeros((2, 64, 60, 3), np.uint8), 3.5, ValueError, "expected square RGB tiles"),
        (np.zeros((2, 64, 64, 4), np.uint8), 3.5, ValueError, "expected square RGB tiles"),
        (np.zeros((2, 64, 64, 3), np.uint8), 0.0, ValueError, "`mpp`: 0.0 um per px; give a number from 0.05 to 50"),
        (np.zeros((2, 64, 64, 3), np.uint8), "0.5", ValueError, "`mpp`: '0.5' um per px"),
        (np.zeros((2, 64, 64, 3), np.uint8), float("nan"), ValueError, "`mpp`: nan"),
        (
            np.zeros((2, 64, 64, 3), np.uint8),
            0.5,
            ValueError,
            "are 32 um wide, but the model reads tiles of 224 um; cut",
        ),
    ],
)
def test_tiles_that_cannot_be_used_are_refused(quick: Path, tiles: np.ndarray, mpp: float, error: type, message: str):
    with pytest.raises(error, match=message):
        Model(Predictor.load(quick)).predict_tiles(tiles, mpp, GENES)


def test_positions_of_tiles_are_checked(quick: Path):
    model, tiles = Model(Predictor.load(quick)), np.zeros((2, 64, 64, 3), np.uint8)
    with pytest.raises(
        ValueError, match=r"of shape \(3, 2\): expected \(2, 2\) for 2 tiles; pass the centre of every tile"
    ):
        model.predict_tiles(tiles, 3.5, GENES, xy=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="1 of 2 positions are not finite"):
        model.predict_tiles(tiles, 3.5, GENES, xy=np.array([[0, np.nan], [1, 1]]))
    with pytest.raises(SourceError, match="species"):
        model.predict_tiles(tiles, 3.5, GENES, species="rat")


def test_digests_of_settings_differ():
    assert pieces.digest({"a": 1}) != pieces.digest({"a": 2})
