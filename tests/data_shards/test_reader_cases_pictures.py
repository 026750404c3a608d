"""Pictures as they occur: the same pixels, scale and refusals whatever the size of the file and its reader."""

from pathlib import Path

import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.slides import open as images
from comtip_shards.slides.open import image_size, open_slide
from comtip_shards.slides.pixel_scale import tiff_mpp
from PIL import Image

tifffile = pytest.importorskip("tifffile")
READERS = {"small": images.WINDOWED_PX, "large": 1000}


def picture(w: int = 800, h: int = 600) -> np.ndarray:
    a = np.full((h, w, 3), 235, np.uint8)
    a[30 : h - 30, 30 : w - 30] = (190, 120, 170)
    a[::7, ::5] = (120, 60, 140)
    return a


@pytest.fixture(params=list(READERS))
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read the file whole, and in windows."""
    monkeypatch.setattr(images, "WINDOWED_PX", READERS[request.param])
    return str(request.param)


@pytest.mark.parametrize("n_small", [1, 2])
def test_the_largest_page_is_the_picture(tmp_path: Path, reader: str, n_small: int):
    path, rgb = tmp_path / "a.tif", picture()
    with tifffile.TiffWriter(path) as t:
        for _ in range(n_small):
            t.write(rgb[::8, ::8], photometric="rgb", metadata=None)
        t.write(rgb, tile=(256, 256), photometric="rgb", metadata=None)
    assert image_size(path) == (800, 600)
    with open_slide(path) as slide:
        assert slide.size == (800, 600)
        np.testing.assert_array_equal(slide.whole(), rgb)


def test_a_pyramid_with_the_largest_page_first(tmp_path: Path, reader: str):
    path, rgb = tmp_path / "a.tif", picture()
    with tifffile.TiffWriter(path) as t:
        t.write(rgb, tile=(256, 256), photometric="rgb", metadata=None)
        t.write(rgb[::2, ::2], tile=(256, 256), photometric="rgb", metadata=None)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.whole(), rgb)


def test_several_pages_of_one_size_are_refused(tmp_path: Path, reader: str):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.stack([picture()] * 3), photometric="rgb", metadata=None)
    with pytest.raises(SourceError, match=r"a\.tif: .*not a single colour or grey image"):
        open_slide(path)


OME = {
    "um": (0.25, "µm", 0.25),
    "nm": (250.0, "nm", 0.25),
    "mm": (0.00025, "mm", 0.25),
    "no unit": (0.25, None, 0.25),
    "pixel": (1.0, "pixel", None),
    "absurd": (1e6, "µm", None),
}


@pytest.mark.parametrize("unit", OME)
def test_the_scale_of_ome_xml(tmp_path: Path, reader: str, unit: str):
    size, name, mpp = OME[unit]
    path = tmp_path / "a.ome.tif"
    meta = {"axes": "YXS", "PhysicalSizeX": size} | ({"PhysicalSizeXUnit": name} if name else {})
    tifffile.imwrite(path, picture(), tile=(256, 256), photometric="rgb", ome=True, metadata=meta)
    with open_slide(path) as slide:
        assert slide.mpp == (pytest.approx(mpp) if mpp else None)
        np.testing.assert_array_equal(slide.whole(), picture())
    notes: list[str] = []
    assert images.mpp_by_tag(path, notes) == (pytest.approx(mpp) if mpp else None)


@pytest.mark.parametrize(("per_cm", "mpp"), [(20_000, 0.5), (72 / 2.54, None), (40_000, 0.25)])
def test_the_scale_of_resolution_tags(tmp_path: Path, reader: str, per_cm: float, mpp: float | None):
    path = tmp_path / "a.tif"
    unit = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, picture(), tile=(256, 256), photometric="rgb", metadata=None, **unit)
    with open_slide(path) as slide:
        assert slide.mpp == (pytest.approx(mpp) if mpp else None)


@pytest.mark.parametrize(
    ("unit", "per_unit"), [("MILLIMETER", 2_000), ("MICROMETER", 2), ("CENTIMETER", 20_000), ("INCH", 50_800)]
)
def test_the_units_of_resolution_tags(tmp_path: Path, reader: str, unit: str, per_unit: float):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(), resolution=(per_unit, per_unit), resolutionunit=unit, metadata=None)
    assert images.mpp_by_tag(path, []) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("unit", "per_unit"), [("um", 2), ("\\u00B5m", 2), ("cm", 20_000), ("inch", 50_800), ("pixel", 1)]
)
def test_the_units_of_imagej(tmp_path: Path, reader: str, unit: str, per_unit: float):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(), imagej=True, resolution=(per_unit, per_unit), metadata={"unit": unit})
    assert images.mpp_by_tag(path, []) == (None if unit == "pixel" else pytest.approx(0.5))


def test_jpeg_2000(tmp_path: Path, reader: str):
    pytest.importorskip("imagecodecs")
    path = tmp_path / "a.ome.tif"
    meta = {"axes": "YXS", "PhysicalSizeX": 0.25}
    tifffile.imwrite(
        path, picture(), tile=(256, 256), compression="jpeg2000", photometric="rgb", ome=True, metadata=meta
    )
    with open_slide(path) as slide:
        assert (slide.size, slide.mpp) == ((800, 600), pytest.approx(0.25))
        assert np.abs(slide.whole().astype(int) - picture()).mean() < 3


def test_aperio_mpp_with_a_comma_without_openslide():
    text = "Aperio Image Library v12.0\n800x600 [0,0 800x600] (240x240) JPEG/RGB Q=70|AppMag = 20|MPP = {}"
    for number in ("0,500000", "0.5"):
        assert tiff_mpp(text.format(number), (800, 600), (None, None), None) == 0.5


def test_aperio_mpp_with_a_comma(tmp_path: Path):
    pytest.importorskip("openslide")
    path = tmp_path / "a.svs"
    text = "Aperio Image Library v12.0\n800x600 [0,0 800x600] (240x240) JPEG/RGB Q=70|AppMag = 20|MPP = 0,500000"
    tifffile.imwrite(
        path, picture(), tile=(240, 240), compression="jpeg", photometric="rgb", metadata=None, description=text
    )
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "P", "L"])
def test_modes_of_pillow(tmp_path: Path, mode: str):
    path, rgb = tmp_path / "a.tif", Image.fromarray(picture())
    rgb.convert(mode).save(path)
    with open_slide(path) as slide:
        want = np.asarray(rgb.convert(mode).convert("RGB"))
        assert np.abs(slide.whole().astype(int) - want).max() <= 2


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("layout", ["YXS", "SYX", "1YXS"])
def test_layouts_of_channels(tmp_path: Path, reader: str, bits: int, layout: str):
    path, rgb = tmp_path / "a.tif", picture()
    values = rgb if bits == 8 else rgb.astype(np.uint16) * 257
    if layout == "SYX":
        values = values.transpose(2, 0, 1)
        tifffile.imwrite(path, values, photometric="rgb", planarconfig="separate", metadata=None)
    else:
        tifffile.imwrite(path, values[None] if layout == "1YXS" else values, photometric="rgb", metadata=None)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.whole(), rgb)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "svs", "ome.tif"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"", "the file is empty"),
    ],
)
def test_pictures_that_are_no_data(tmp_path: Path, suffix: str, content: bytes, message: str):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    for read in (open_slide, image_size):
        with pytest.raises(SourceError, match=message):
            read(path)
