"""Whole-slide images read in windows equal the image in memory for every file type, and memory stays bounded."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
from comtip_shards import SourceError, errors
from comtip_shards.slides import base, wsi
from comtip_shards.slides import open as image_module
from comtip_shards.slides.base import ArraySlide
from comtip_shards.slides.colour import peak_of, to_rgb8
from comtip_shards.slides.open import image_size, load_rgb, open_slide
from PIL import Image

RNG = np.random.default_rng(0)


def smooth(height: int, width: int) -> np.ndarray:
    """Return an image with detail at several scales and no noise that JPEG would remove."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / a + y / b + c) for a, b, c in ((40, 90, 0), (13, 50, 1), (70, 11, 2))]
    return np.stack([140 + 80 * w for w in waves], axis=-1).astype(np.uint8)


PICTURE = smooth(700, 900)
SPOTS = np.array([[450.0, 350.0], [120.3, 600.8], [5.0, 5.0], [898.0, 350.0], [-10.0, 690.0]])


def write_pyramid(path: Path, picture: np.ndarray, levels: int = 3, *, subifds: bool = True, **options) -> Path:
    """Write a tiled BigTIFF as scanners do: each level half the size of the previous, as SubIFDs or as pages."""
    options = {"tile": (128, 128), "photometric": "rgb"} | options
    halves = [
        Image.fromarray(picture).resize((picture.shape[1] >> i, picture.shape[0] >> i), Image.Resampling.BOX)
        for i in range(levels)
    ]
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        more = {"subifds": levels - 1} if subifds else {}
        out.write(np.asarray(halves[0]), resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **more, **options)
        for level in halves[1:]:
            out.write(np.asarray(level), subfiletype=1, **options)
    return path


@pytest.fixture
def windowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read every TIFF in windows, however small it is."""
    monkeypatch.setattr(image_module, "WINDOWED_PX", 0)


def tiles_of(path: Path, min_mpp: float, px: int = 48, xy: np.ndarray = SPOTS) -> np.ndarray:
    with open_slide(path) as slide:
        return slide.tiles(xy, 0.5, 60.0, px, min_mpp)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.usefixtures("windowed")
@pytest.mark.parametrize("subifds", [True, False])
@pytest.mark.parametrize("min_mpp", [0.3, 0.8, 1.0, 2.3])
def test_windows_equal_the_picture_in_memory(tmp_path: Path, min_mpp: float, subifds: bool):
    path = write_pyramid(tmp_path / "a.tif", PICTURE, subifds=subifds)
    in_memory = ArraySlide(PICTURE, path)
    want = in_memory.tiles(SPOTS, 0.5, 60.0, 48, min_mpp)
    # Level 0 gives the same pixels up to rounding; coarser levels were computed with another filter.
    assert difference(tiles_of(path, min_mpp), want) <= (2 if min_mpp < 1 else 8)
    # Outside is white, at the same pixels: a tile at the corner is 60 um wide, its spot 2.5 um from the edges.
    assert (tiles_of(path, min_mpp)[2, :20, :20] == 255).all()
    with open_slide(path) as slide:
        assert slide.size == (900, 700)
        assert slide.mpp == 0.5
        assert slide.levels == [(900, 700), (450, 350), (225, 175)]
        small, factor = slide.overview(300)
    assert factor == pytest.approx(3)
    assert difference(small, in_memory.overview(300)[0]) <= 8


@pytest.mark.usefixtures("windowed")
def test_a_level_just_fine_enough_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_pyramid(tmp_path / "a.tif", PICTURE)
    asked = []
    real = wsi.BlockedSlide._read
    monkeypatch.setattr(
        wsi.BlockedSlide, "_read", lambda self, level, *box: asked.append(level) or real(self, level, *box)
    )
    for min_mpp, level in ((0.5, 0), (0.9, 0), (1.0, 1), (1.9, 1), (2.0, 2), (9.0, 2)):
        asked.clear()
        tiles_of(path, min_mpp)
        assert set(asked) == {level}


@pytest.mark.usefixtures("windowed")
def test_jpeg_compression_costs_what_jpeg_costs(tmp_path: Path):
    path = write_pyramid(tmp_path / "a.tif", PICTURE, compression="jpeg", compressionargs={"level": 95})
    want = ArraySlide(PICTURE, path).tiles(SPOTS, 0.5, 60.0, 48, 0.5)
    got = tiles_of(path, 0.5)
    assert np.abs(got.astype(int) - want.astype(int)).mean() < 2


def test_openslide_reads_what_it_reads_alike(tmp_path: Path):
    openslide = pytest.importorskip("openslide")
    path = write_pyramid(tmp_path / "a.tif", PICTURE, subifds=False, compression="jpeg", compressionargs={"level": 98})
    with wsi.OpenSlideSlide(path, openslide) as slide:
        assert slide.mpp == 0.5
        assert slide.levels == [(900, 700), (450, 350), (225, 175)]
        for min_mpp in (0.5, 1.0, 2.3):
            want = ArraySlide(PICTURE, path).tiles(SPOTS, 0.5, 60.0, 48, min_mpp)
            got = slide.tiles(SPOTS, 0.5, 60.0, 48, min_mpp)
            assert np.abs(got.astype(int) - want.astype(int)).mean() < 2
            assert (got[2, :20, :20] == 255).all()


def ome(path: Path, pixels: np.ndarray, axes: str, photometric: str = "rgb") -> None:
    meta = {"axes": axes, "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"}
    planar = {"planarconfig": "separate"} if axes.startswith("S") else {}
    tifffile.imwrite(path, pixels, ome=True, photometric=photometric, tile=(128, 128), metadata=meta, **planar)


LAYOUTS = {
    "y x 3": lambda p: ome(p, PICTURE, "YXS"),
    "1 y x 3": lambda p: ome(p, PICTURE[None], "ZYXS"),
    "3 y x": lambda p: ome(p, np.moveaxis(PICTURE, 2, 0), "CYX", "minisblack"),
    "3 y x planar": lambda p: tifffile.imwrite(
        p, np.moveaxis(PICTURE, 2, 0), photometric="rgb", planarconfig="separate", tile=(128, 128)
    ),
    "4 y x": lambda p: ome(
        p, np.concatenate([np.moveaxis(PICTURE, 2, 0), PICTURE[None, ..., 0] * 0]), "CYX", "minisblack"
    ),
    "y x 4, opaque": lambda p: tifffile.imwrite(
        p, np.dstack([PICTURE, np.full((700, 900, 1), 255, np.uint8)]), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "16 bits": lambda p: tifffile.imwrite(p, PICTURE.astype(np.uint16) * 257, photometric="rgb", tile=(128, 128)),
    "12 bits in 16": lambda p: tifffile.imwrite(
        p, PICTURE.astype(np.uint16) * 16 + 8, photometric="rgb", tile=(128, 128)
    ),
    "in one piece": lambda p: tifffile.imwrite(p, PICTURE, photometric="rgb"),
    "strips": lambda p: tifffile.imwrite(p, PICTURE, photometric="rgb", rowsperstrip=13, compression="zlib"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_axes_and_depths(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.ome.tif"
    LAYOUTS[name](path)
    monkeypatch.setattr(image_module, "WINDOWED_PX", 0)
    with open_slide(path) as slide:
        assert isinstance(slide, wsi.TiffSlide)
        assert slide.size == (900, 700)
        assert difference(slide.whole(), PICTURE) <= 1
        if "x 3" in name and "planar" not in name:
            assert slide.mpp == 0.25
    # A small file of the same layout is read by Pillow if it reads it correctly, with the same result.
    monkeypatch.undo()
    assert image_size(path) == (900, 700)
    assert difference(load_rgb(path), PICTURE) <= 1


@pytest.mark.parametrize("windows_from", [0, 10**8])
def test_gray_and_what_is_transparent(tmp_path: Path, windows_from: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_module, "WINDOWED_PX", windows_from)
    gray = PICTURE[..., 0]
    for name, values in (
        ("a.png", gray),
        ("b.png", gray.astype(np.uint16) * 257),
        ("c.tif", gray.astype(np.uint16) * 257),
    ):
        if name.endswith("tif"):
            tifffile.imwrite(tmp_path / name, values)
        else:
            Image.fromarray(values).save(tmp_path / name)
        assert difference(load_rgb(tmp_path / name), np.repeat(gray[..., None], 3, 2)) <= 1
    rgba = np.dstack([PICTURE, np.zeros((700, 900, 1), np.uint8)])
    rgba[:, 450:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "d.png")
    tifffile.imwrite(tmp_path / "d.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], tile=(128, 128))
    for name in ("d.png", "d.tif"):
        shown = load_rgb(tmp_path / name)
        assert (shown[:, :450] == 255).all()
        np.testing.assert_array_equal(shown[:, 450:], PICTURE[:, 450:])


def test_depths_are_distinguished():
    for high, peak in ((1.0, 1.0), (200.0, 255.0), (255.4, 4095.0), (60_000.0, 65_535.0)):
        assert peak_of(np.array([0.1, high], np.float32)) == peak
    assert peak_of(np.array([0, 1], np.uint16)) == 255
    assert (to_rgb8(np.full((1, 1, 3), 4095, np.uint16), 4095.0) == 255).all()
    with pytest.raises(SourceError, match="no known bit depth"):
        peak_of(np.array([1e6]))


def test_resolution_tags_are_believed_only_where_a_microscope_could_have_written_them(tmp_path: Path):
    for dpi, mpp in ((25_400 / 0.5, 0.5), (96, None), (0, None)):
        Image.fromarray(PICTURE).save(tmp_path / "a.png", dpi=(dpi, dpi))
        with open_slide(tmp_path / "a.png") as slide:
            assert slide.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-3))


def test_memory_is_bounded_by_blocks_and_not_by_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # 8,192 x 6,144 px: 151 MB as RGB.
    path = tmp_path / "big.tif"
    block = np.full((512, 512, 3), 180, np.uint8)
    tifffile.imwrite(
        path,
        (block for _ in range(16 * 12)),
        shape=(6144, 8192, 3),
        dtype=np.uint8,
        photometric="rgb",
        tile=(512, 512),
        compression="jpeg",
        bigtiff=True,
    )
    monkeypatch.setattr(wsi, "CACHE_BYTES", 8 << 20)
    monkeypatch.setattr(base, "BAND_PX", 4_000_000)
    monkeypatch.setattr(image_module, "WINDOWED_PX", 10_000_000)
    xy = RNG.uniform((0, 0), (8192, 6144), (100, 2))
    tracemalloc.start()
    with open_slide(path) as slide:
        tiles = slide.tiles(xy, 0.5, 112.0, 32, 0.5)
        assert tiles.shape == (100, 32, 32, 3)
        slide.overview(256)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, f"{peak / 1e6:.0f} MB at most"


def test_bad_pictures_are_reported_with_name_and_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_module, "WINDOWED_PX", 0)
    path = write_pyramid(tmp_path / "a.tif", PICTURE, compression="zlib")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(SourceError, match=r"a\.tif.*complete"):
        tiles_of(path, 0.5)
    path.write_bytes(b"II*\0" + b"\0" * 100)
    with pytest.raises(SourceError, match=r"a\.tif: cannot be read as a slide.*tifffile"):
        open_slide(path)
    path.write_bytes(b"nothing")
    with pytest.raises(SourceError, match=r"a\.tif: not an image"):
        open_slide(path)
    tifffile.imwrite(path, np.zeros((7, 64, 64), np.uint8), photometric="minisblack")
    with pytest.raises(SourceError, match="not a single colour or grey image"):
        open_slide(path)
    with pytest.raises(SourceError, match=r"gone\.tif: no such image"):
        open_slide(tmp_path / "gone.tif")
    monkeypatch.setattr(base, "MAX_WHOLE_PX", 100)
    Image.fromarray(PICTURE).save(tmp_path / "b.png")
    with pytest.raises(SourceError, match=r"b\.png: 900 x 700 px in PNG, which can only be decoded whole; convert it"):
        open_slide(tmp_path / "b.png")
    write_pyramid(path, PICTURE)
    with pytest.raises(SourceError, match="are too many to load"):
        load_rgb(path)
    monkeypatch.setattr(wsi, "MAX_BLOCK_BYTES", 1000)
    with pytest.raises(SourceError, match="cannot be read in windows; convert it"):
        open_slide(path)


def test_without_the_extra_its_name_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_module, "WINDOWED_PX", 0)
    monkeypatch.setattr(wsi, "_optional", lambda name: None)
    path = write_pyramid(tmp_path / "a.tif", PICTURE)
    with pytest.raises(SourceError, match=r"not installed.*pip install 'comtip-fast\[wsi\]'"):
        open_slide(path)
    monkeypatch.setattr(errors, "version", lambda name: {"comtip-shards": "0.1.0"}[name])  # comtip_shards alone
    with pytest.raises(SourceError, match=r"not installed.*pip install 'comtip-shards\[wsi\]'"):
        open_slide(path)


def refusal(path: Path) -> str | None:
    """Return why a slide cannot be read, or None."""
    try:
        with wsi.open_windowed(path) as slide:
            slide.whole()
    except SourceError as error:
        return str(error)
    return None


def test_whatever_becomes_of_a_header_the_picture_is_read_or_the_file_is_named(tmp_path: Path):
    whole = write_pyramid(tmp_path / "whole.tif", PICTURE[:256, :256], compression="deflate").read_bytes()
    refused = []
    for case in range(150):
        data = bytearray(whole)
        for offset in RNG.integers(0, len(data) if case % 2 else 400, 3):
            data[offset] = RNG.choice([0, 255, int(RNG.integers(256))])
        path = tmp_path / f"{case}.tif"
        path.write_bytes(data)
        why = refusal(path)
        if why is not None:
            refused.append(path.name in why)
    assert len(refused) > 10
    assert all(refused)
