"""The table of pictures in data_shards/README.md: one case or more per row, each through both readers."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.slides import base
from comtip_shards.slides import open as images
from comtip_shards.slides.open import image_size, mpp_by_tag, open_slide
from PIL import Image

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")
README = Path(__file__).parents[2] / "data_shards/README.md"
READERS = {"whole": images.WINDOWED_PX, "windows": 1000}


def section(w: int = 160, h: int = 120) -> np.ndarray:
    """Return a picture without symmetry, with colours that identify each conversion."""
    a = np.full((h, w, 3), 235, np.uint8)
    a[20 : h - 20, 20 : w - 20] = (190, 120, 170)
    a[::7, ::5] = (120, 60, 140)
    a[:20, :40] = (200, 20, 30)
    return a


RGB = section()
GREY = np.ascontiguousarray(RGB[..., 0])
GREY_RGB = np.repeat(GREY[..., None], 3, 2)
HALF = np.rint(RGB * (128 / 255) + 127).astype(np.uint8)  # half-transparent on white
TILED: dict[str, Any] = {"tile": (64, 64), "metadata": None}


@dataclass(frozen=True)
class Case:
    """One file with what must come of it."""

    row: str
    """First cell of its row in the README."""
    write: Callable[[Path], object]
    pixels: np.ndarray | None = None
    """Expected pixels, None if the file is refused."""
    refusal: str = ""
    mpp: float | None = None
    suffix: str = ".tif"
    tolerance: float = 0.0
    """Maximum mean difference of pixels, for lossy compression and colour spaces."""
    note: str = ""


def tiff(values: np.ndarray, **options: Any) -> Callable[[Path], object]:
    """Return a writer of a tiled TIFF."""
    return lambda path: tifffile.imwrite(path, values, **({"photometric": "rgb"} | TILED | options))


def ome(values: np.ndarray, axes: str, photometric: str = "rgb", **metadata: Any) -> Callable[[Path], object]:
    """Return a writer of an OME-TIFF."""
    meta = {"axes": axes} | metadata
    return lambda path: tifffile.imwrite(path, values, photometric=photometric, ome=True, tile=(64, 64), metadata=meta)


def pages(*options: dict[str, Any], ome_xml: bool = False) -> Callable[[Path], object]:
    """Return a writer of a TIFF of several pages."""

    def write(path: Path) -> None:
        with tifffile.TiffWriter(path, ome=ome_xml) as out:
            for page in options:
                out.write(**({"photometric": "rgb"} | ({} if ome_xml else {"metadata": None}) | page))

    return write


def pillow(mode: str = "RGB", fmt: str = "TIFF", values: np.ndarray = RGB, **options: Any) -> Callable[[Path], object]:
    """Return a writer with Pillow."""
    return lambda path: Image.fromarray(values).convert(mode).save(path, fmt, **options)


def turned(fmt: str, orientation: int) -> Callable[[Path], object]:
    """Return a writer of an image with an orientation in its EXIF data."""

    def write(path: Path) -> None:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(RGB).save(path, fmt, exif=exif, **({"quality": 98} if fmt == "JPEG" else {}))

    return write


def plain_tiff(bits: int, data: bytes, size: tuple[int, int], more: dict[int, tuple[int, int]]) -> Callable:
    """Return a writer of a one-strip grey TIFF with exactly the given tags: {tag: (type, value or offset)}."""

    def write(path: Path) -> None:
        tags = {256: (3, size[0]), 257: (3, size[1]), 258: (3, bits), 259: (3, 1), 262: (3, 1), 273: (4, 200)}
        tags |= {277: (3, 1), 278: (3, size[1]), 279: (4, len(data))} | more
        entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(tags.items()))
        head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
        head = head.ljust(184, b"\0") + struct.pack("<II", 50_800, 1)
        path.write_bytes(head.ljust(200, b"\0") + data)

    return write


def palette() -> Callable[[Path], object]:
    """Return a writer of a tiled palette image of the section's exact colours."""
    colours, index = np.unique(RGB.reshape(-1, 3), axis=0, return_inverse=True)
    table = np.zeros((3, 256), np.uint16)
    table[:, : len(colours)] = colours.T.astype(np.uint16) * 257
    return tiff(index.reshape(GREY.shape).astype(np.uint8), photometric="palette", colormap=table)


def with_alpha(values: np.ndarray, opacity: int) -> np.ndarray:
    """Return values with a channel of constant opacity."""
    return np.dstack([values, np.full(GREY.shape, opacity, values.dtype)])


PREMULTIPLIED = np.rint(RGB * (128 / 255)).astype(np.uint8)
WIDE = RGB.astype(np.uint16)
UM, RES = {"resolutionunit": "CENTIMETER"}, "resolution"
APERIO = "Aperio Image Library v12.0\n160x120 [0,0 160x120] (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0,500000"
SMALL = RGB[::8, ::8].copy()
NO_SINGLE = "are not a single colour or grey image"

CASES = {
    # -- which image ------------------------------------------------------------------------------------------
    "pyramid": Case("pyramid", pages({"data": RGB, **TILED}, {"data": RGB[::2, ::2], "subfiletype": 1}), RGB),
    "pyramid of grey pages": Case(
        "pyramid",
        pages(
            {"data": GREY, "photometric": "minisblack"},
            {"data": GREY[::2, ::2], "photometric": "minisblack", "subfiletype": 1},
        ),
        GREY_RGB,
    ),
    "pyramid in SubIFDs": Case(
        "pyramid",
        pages(
            {"data": RGB, "subifds": 1, "metadata": {"axes": "YXS", "PhysicalSizeX": 0.5}, "tile": (64, 64)},
            {"data": RGB[::2, ::2], "subfiletype": 1, "tile": (64, 64)},
            ome_xml=True,
        ),
        RGB,
        mpp=0.5,
        suffix=".ome.tif",
    ),
    "thumbnail first": Case("thumbnail, label or mask", pages({"data": SMALL}, {"data": RGB}), RGB),
    "thumbnail with a scale first": Case(
        "thumbnail, label or mask",
        pages({"data": SMALL, RES: (2500, 2500), **UM}, {"data": RGB, RES: (20_000, 20_000), **UM}),
        RGB,
        mpp=0.5,
    ),
    "label last": Case("thumbnail, label or mask", pages({"data": RGB}, {"data": SMALL}), RGB),
    "mask of the same size": Case(
        "thumbnail, label or mask",
        pages({"data": RGB}, {"data": GREY > 100, "photometric": "mask", "subfiletype": 4}),
        RGB,
    ),
    "two sections": Case("several images of one size", pages({"data": RGB}, {"data": RGB[::-1]}), refusal=NO_SINGLE),
    "animated WebP": Case(
        "animation",
        pillow("RGB", "WEBP", save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())]),
        refusal="2 frames in WEBP, not a single image; save",
        suffix=".webp",
    ),
    "animated PNG": Case(
        "animation",
        pillow("RGB", "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())]),
        refusal="2 frames in PNG, not a single image; save",
        suffix=".png",
    ),
    "GIF": Case(
        "animation",
        pillow("RGB", "GIF", save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())]),
        refusal="2 frames in GIF, not a single image; save",
        suffix=".png",
    ),
    "MPO": Case(
        "JPEG with a preview (MPO)",
        pillow("RGB", "MPO", save_all=True, quality=98, append_images=[Image.fromarray(RGB[::-1].copy())]),
        RGB,
        suffix=".jpg",
        tolerance=3,
    ),
    # -- planes and channels ------------------------------------------------------------------------------------
    "z-stack of colour": Case("z-planes, time points", ome(np.stack([RGB] * 3), "ZYXS"), refusal=NO_SINGLE),
    "z-stack of 3 grey planes": Case(
        "z-planes, time points", ome(np.stack([GREY] * 3), "ZYX", "minisblack"), refusal=NO_SINGLE
    ),
    "z-stack of ImageJ": Case(
        "z-planes, time points",
        lambda p: tifffile.imwrite(p, RGB.transpose(2, 0, 1), imagej=True, metadata={"axes": "ZYX"}),
        refusal=NO_SINGLE,
    ),
    "two time points": Case("z-planes, time points", ome(np.stack([RGB] * 2), "TYXS"), refusal=NO_SINGLE),
    "channels first": Case("3 or 4 channels", ome(RGB.transpose(2, 0, 1), "CYX", "minisblack"), RGB),
    "four channels first": Case(
        "3 or 4 channels", ome(np.stack([*RGB.transpose(2, 0, 1), GREY * 0]), "CYX", "minisblack"), RGB
    ),
    "three grey pages": Case(
        "3 or 4 channels", pages(*({"data": RGB[..., c].copy(), "photometric": "minisblack"} for c in range(3))), RGB
    ),
    "planar": Case("3 or 4 channels", tiff(RGB.transpose(2, 0, 1), planarconfig="separate"), RGB),
    "planar, 16 bits": Case("3 or 4 channels", tiff(WIDE.transpose(2, 0, 1) * 257, planarconfig="separate"), RGB),
    "composite of ImageJ": Case(
        "3 or 4 channels",
        lambda p: tifffile.imwrite(
            p, RGB.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX", "mode": "composite"}
        ),
        RGB,
    ),
    "2 channels": Case(
        "2 channels (except grey with opacity), 5 or more",
        ome(np.stack([GREY] * 2), "CYX", "minisblack"),
        refusal=NO_SINGLE,
    ),
    "5 channels": Case(
        "2 channels (except grey with opacity), 5 or more",
        ome(np.stack([GREY] * 5), "CYX", "minisblack"),
        refusal=NO_SINGLE,
    ),
    # -- colour spaces --------------------------------------------------------------------------------------------
    "grey": Case("grey", tiff(GREY, photometric="minisblack"), GREY_RGB),
    "white is zero": Case("grey", tiff(255 - GREY, photometric="miniswhite"), GREY_RGB),
    "white is zero, 8 bits with sign": Case(
        "grey",
        tiff((127 - np.rint(GREY * (127 / 255))).astype("i1"), photometric="miniswhite"),
        np.rint(np.rint(GREY_RGB * (127 / 255)) * (255 / 127)),
    ),
    "white is zero, 16 bits with sign": Case(
        "grey", tiff((32767 - np.rint(GREY * (32767 / 255))).astype("i2"), photometric="miniswhite"), GREY_RGB
    ),
    "white is zero, 16 bits": Case("grey", tiff(65535 - GREY.astype("u2") * 257, photometric="miniswhite"), GREY_RGB),
    "one bit": Case("grey", pillow("1", values=np.where(GREY_RGB > 180, 255, 0).astype("u1")), GREY_RGB // 181 * 255),
    "one bit, white is zero": Case("grey", tiff(GREY <= 180, photometric="miniswhite"), GREY_RGB // 181 * 255),
    "palette of Pillow": Case("palette", pillow("P"), np.asarray(Image.fromarray(RGB).convert("P").convert("RGB"))),
    "palette": Case("palette", palette(), RGB),
    "CMYK of Pillow": Case("CMYK, YCbCr, LAB", pillow("CMYK"), RGB, tolerance=1),
    "CMYK": Case(
        "CMYK, YCbCr, LAB",
        tiff(np.asarray(Image.fromarray(RGB).convert("CMYK")), photometric="separated"),
        RGB,
        tolerance=1,
    ),
    "CMYK, 16 bits": Case(
        "CMYK, YCbCr, LAB",
        tiff(np.asarray(Image.fromarray(RGB).convert("CMYK")).astype("u2") * 257, photometric="separated"),
        RGB,
        tolerance=1,
    ),
    "CMYK JPEG": Case("CMYK, YCbCr, LAB", pillow("CMYK", "JPEG", quality=98), RGB, suffix=".jpg", tolerance=3),
    "YCbCr": Case("CMYK, YCbCr, LAB", pillow("YCbCr"), RGB, tolerance=1.5),
    "YCbCr in JPEG": Case(
        "CMYK, YCbCr, LAB", tiff(RGB, compression="jpeg", compressionargs={"level": 98}), RGB, tolerance=4
    ),
    "LAB": Case(
        "CMYK, YCbCr, LAB",
        lambda p: Image.fromarray(np.full((40, 50, 3), (180, 0, 0), "u1"), "LAB").save(p, "TIFF"),
        np.full((40, 50, 3), 172, np.uint8),
        tolerance=4,
    ),
    "colour filter array": Case(
        "other colour spaces", tiff(GREY, photometric="cfa"), refusal="colour space CFA is not supported; convert"
    ),
    # -- depth ---------------------------------------------------------------------------------------------------
    "16 bits": Case("16 bits", tiff(WIDE * 257), RGB),
    "16 bits, big-endian": Case("16 bits", tiff(WIDE * 257, byteorder=">"), RGB),
    "16-bit PNG": Case("16 bits", lambda p: png16(p, WIDE * 257), RGB, suffix=".png"),
    "16-bit grey PNG": Case("16 bits", lambda p: png16(p, WIDE[..., 0] * 257), GREY_RGB, suffix=".png"),
    "12 bits in 16": Case("12 or 8 bits in 16", tiff(WIDE * 16), RGB, tolerance=1.5),
    "8 bits in 16": Case("12 or 8 bits in 16", tiff(WIDE), RGB),
    "12 bits in a PNG": Case(
        "12 or 8 bits in 16",
        lambda p: png16(p, WIDE * 16),
        refusal="16-bit values of which at most 12 bits are used, .*; save it as TIFF",
        suffix=".png",
    ),
    "4 bits": Case(
        "other depths",
        plain_tiff(4, bytes([0x0F, 0x5A] * 40), (4, 40), {}),
        np.repeat(np.tile(np.array([0, 255, 85, 170], "u1"), (40, 1))[..., None], 3, 2),
    ),
    "float": Case("other depths", tiff(RGB.astype(np.float32) / 255), RGB),
    "double": Case("other depths", tiff(RGB / 255), RGB),
    "32 bits": Case("other depths", tiff(RGB.astype(np.uint32)), RGB),
    "not a number": Case(
        "other depths",
        tiff(np.where(RGB == 20, np.nan, RGB / 255).astype("f4")),
        refusal="up to nan have no known bit depth",
    ),
    "complex": Case("other depths", tiff(RGB.astype("c8")), refusal="type complex64 are not supported; convert"),
    "too large": Case("other depths", tiff(RGB.astype("f4") * 1e6), refusal="have no known bit depth; convert"),
    # -- opacity -------------------------------------------------------------------------------------------------
    "straight": Case("opacity", tiff(with_alpha(RGB, 128), extrasamples=["unassalpha"]), HALF, tolerance=0.7),
    "premultiplied": Case(
        "opacity", tiff(with_alpha(PREMULTIPLIED, 128), extrasamples=["assocalpha"]), HALF, tolerance=1.5
    ),
    "grey with opacity": Case(
        "opacity",
        tiff(np.dstack([GREY, GREY * 0]), photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]),
        np.full_like(RGB, 255),
    ),
    "PNG with opacity": Case(
        "opacity", pillow("RGBA", "PNG", with_alpha(RGB, 128)), HALF, suffix=".png", tolerance=0.7
    ),
    "PNG with a transparent colour": Case(
        "opacity",
        pillow("RGB", "PNG", transparency=(190, 120, 170)),
        np.where((RGB == (190, 120, 170)).all(-1, keepdims=True), 255, RGB).astype(np.uint8),
        suffix=".png",
    ),
    "fourth sample of no meaning": Case("opacity", tiff(with_alpha(RGB, 0), extrasamples=["unspecified"]), RGB),
    # -- orientation ---------------------------------------------------------------------------------------------
    **{
        f"TIFF, orientation {n}": Case(
            "orientation tags (EXIF)",
            tiff(RGB, extratags=[(274, "H", 1, n, True)]),
            RGB,
            note=f"orientation tag {n} is ignored",
        )
        for n in (3, 6)
    },
    "JPEG, orientation 6": Case(
        "orientation tags (EXIF)",
        turned("JPEG", 6),
        RGB,
        suffix=".jpg",
        tolerance=3,
        note="orientation tag 6 is ignored",
    ),
    "PNG, orientation 8": Case(
        "orientation tags (EXIF)", turned("PNG", 8), RGB, suffix=".png", note="orientation tag 8 is ignored"
    ),
    # -- compression ---------------------------------------------------------------------------------------------
    "JPEG 2000": Case("JPEG 2000", tiff(RGB, compression="jpeg2000"), RGB, tolerance=2),
    "JPEG 2000 of Aperio": Case("JPEG 2000", tiff(RGB, compression=33005), RGB, tolerance=2),
    "JPEG 2000 of Aperio, YCbCr": Case(
        "JPEG 2000", tiff(np.asarray(Image.fromarray(RGB).convert("YCbCr")), compression=33003), RGB, tolerance=3
    ),
    "JP2": Case("JPEG 2000", pillow("RGB", "JPEG2000"), RGB, suffix=".jp2", tolerance=2),
    **{
        name: Case("LZW, deflate, zstd, LZMA, WebP, JPEG XL", tiff(RGB, compression=name, **options), RGB)
        for name, options in {
            "lzw": {"predictor": True},
            "deflate": {},
            "packbits": {},
            "zstd": {},
            "lzma": {},
            "webp": {"compressionargs": {"lossless": True}},
        }.items()
    },
    "jpegxl": Case("LZW, deflate, zstd, LZMA, WebP, JPEG XL", tiff(RGB, compression="jpegxl"), RGB, tolerance=2),
    # -- names ---------------------------------------------------------------------------------------------------
    "TIFF named png": Case("a suffix that is not the format", pillow("RGB", "TIFF"), RGB, suffix=".png"),
    "PNG named tif": Case("a suffix that is not the format", pillow("RGB", "PNG"), RGB),
    # -- scale ---------------------------------------------------------------------------------------------------
    "px per cm": Case("resolution tags", tiff(RGB, resolution=(20_000, 20_000), **UM), RGB, mpp=0.5),
    "px per inch": Case("resolution tags", tiff(RGB, resolution=(50_800, 50_800), resolutionunit="INCH"), RGB, mpp=0.5),
    "no unit is inch": Case(
        "resolution tags",
        plain_tiff(8, bytes(1600), (40, 40), {282: (5, 184), 283: (5, 184)}),
        np.zeros((40, 40, 3), np.uint8),
        mpp=0.5,
    ),
    "PNG": Case("resolution tags", pillow("RGB", "PNG", dpi=(50_800, 50_800)), RGB, mpp=0.5, suffix=".png"),
    **{
        f"{dpi} dpi": Case(
            "resolution tags that are defaults", tiff(RGB, resolution=(dpi, dpi), resolutionunit="INCH"), RGB
        )
        for dpi in (72, 96, 300, 600)
    },
    "unit none": Case(
        "resolution tags that are defaults", tiff(RGB, resolution=(20_000, 20_000), resolutionunit="NONE"), RGB
    ),
    "zero": Case("resolution tags that are defaults", tiff(RGB, resolution=(0, 0), **UM), RGB),
    "not square": Case("pixels that are not square", tiff(RGB, resolution=(20_000, 10_000), **UM), RGB),
    "not square in OME-XML": Case(
        "pixels that are not square", ome(RGB, "YXS", PhysicalSizeX=0.25, PhysicalSizeY=0.5), RGB
    ),
    **{
        f"OME {unit}": Case(
            "OME-XML", ome(RGB, "YXS", PhysicalSizeX=size, PhysicalSizeXUnit=unit), RGB, mpp=mpp, suffix=".ome.tif"
        )
        for unit, size, mpp in (("µm", 0.25, 0.25), ("nm", 250.0, 0.25), ("mm", 0.00025, 0.25), ("pixel", 1.0, None))
    },
    "OME of two images": Case(
        "OME-XML",
        pages(
            {"data": SMALL, "metadata": {"axes": "YXS", "PhysicalSizeX": 4.0}},
            {"data": RGB, "metadata": {"axes": "YXS", "PhysicalSizeX": 0.5}},
            ome_xml=True,
        ),
        RGB,
        mpp=0.5,
        suffix=".ome.tif",
    ),
    **{
        f"ImageJ {unit}": Case(
            "ImageJ",
            lambda p, unit=unit: tifffile.imwrite(p, RGB, imagej=True, resolution=(2, 2), metadata={"unit": unit}),  # type: ignore[misc]
            RGB,
            mpp=mpp,
        )
        for unit, mpp in (("um", 0.5), ("micron", 0.5), ("\\u00B5m", 0.5), ("inch", None))
    },
    "Aperio": Case(
        "Aperio",
        tiff(RGB, compression="jpeg", description=APERIO, compressionargs={"level": 98}),
        RGB,
        mpp=0.5,
        tolerance=4,
    ),
    "Aperio, named svs": Case(
        "Aperio",
        tiff(RGB, compression="jpeg", description=APERIO, compressionargs={"level": 98}),
        RGB,
        mpp=0.5,
        tolerance=4,
        suffix=".svs",
    ),
}


def png16(path: Path, values: np.ndarray) -> None:
    """Write a PNG of 16 bits per channel."""
    import imagecodecs

    path.write_bytes(imagecodecs.png_encode(values))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_both_readers_agree_with_the_table(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    path = tmp_path / f"a{case.suffix}"
    case.write(path)
    for limit in READERS.values():
        monkeypatch.setattr(images, "WINDOWED_PX", limit)
        if case.pixels is None:
            with pytest.raises(SourceError, match=case.refusal) as told, open_slide(path) as slide:
                slide.whole()
            assert str(told.value).startswith(f"{path}: ")
            continue
        with open_slide(path) as slide:
            assert slide.size == (case.pixels.shape[1], case.pixels.shape[0]) == image_size(path)
            assert slide.mpp == mpp_by_tag(path, []) == (None if case.mpp is None else pytest.approx(case.mpp))
            assert np.abs(slide.whole().astype(int) - case.pixels).mean() <= case.tolerance
            assert case.note in " ".join(slide.notes)


def table_rows() -> list[str]:
    """Return the first cells of the table of images."""
    text = README.read_text()
    table = text[text.index("| image | what is read |") :].split("\n\n")[0].splitlines()[2:]
    return [re.split(r"\s*\|\s*", line)[1] for line in table]


def test_every_row_of_the_table_has_a_case():
    rows = table_rows()
    assert len(rows) == len(set(rows))
    assert {case.row for case in CASES.values()} | {"too many pixels"} == set(rows)


# -- too many pixels -----------------------------------------------------------------------------------------------


def png_header(path: Path, width: int, height: int) -> None:
    """Write a PNG that claims a size and holds almost nothing."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            (30_000, 30_000),
            r"claims 30000 x 30000 px in PNG, which decode to more than 200 times the \S+ bytes.*COMTIP_MAX_IMAGE_PX",
        ),
        ((40_000, 40_000), r"40000 x 40000 px in PNG.*tiled TIFF.*COMTIP_MAX_IMAGE_PX \(now 1,000,000,000 px\)"),
        ((2**31 - 1, 2**31 - 1), r".* px is not the size of a section \(at most 100,000,000,000 px\)"),
    ],
)
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int], message: str, monkeypatch):
    path = tmp_path / "a.png"
    png_header(path, *size)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(SourceError, match=rf"a\.png: {message}"):
        open_slide(path)


def test_the_limit_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    monkeypatch.setenv(base.MAX_WHOLE_ENV, "1000")
    with pytest.raises(SourceError, match=r"160 x 120 px in PNG.*COMTIP_MAX_IMAGE_PX \(now 1,000 px\)"):
        open_slide(path)
    monkeypatch.setenv(base.MAX_WHOLE_ENV, "many")
    with pytest.raises(SourceError, match="COMTIP_MAX_IMAGE_PX='many': expected a positive number of pixels"):
        open_slide(path)
    # A blank image that is known to be one: its ratio is that of a bomb.
    monkeypatch.setattr(base, "BOMB_PX", 100)
    blank = tmp_path / "blank.png"
    Image.new("RGB", (2000, 2000)).save(blank)
    monkeypatch.delenv(base.MAX_WHOLE_ENV)
    with pytest.raises(SourceError, match="as a decompression bomb does"):
        open_slide(blank)
    monkeypatch.setenv(base.MAX_WHOLE_ENV, "4000000")
    with open_slide(blank) as slide:
        assert slide.whole().max() == 0


def test_a_tiff_that_claims_a_huge_size_is_bounded(tmp_path: Path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", **TILED)
    data = bytearray(path.read_bytes())
    for tag in (256, 257):
        at = data.index(struct.pack("<HHI", tag, 4, 1))
        struct.pack_into("<HHII", data, at, tag, 4, 1, 2**31 - 1)
    path.write_bytes(data)
    for read in (open_slide, image_size):
        with pytest.raises(
            SourceError,
            match=r"a\.tif: .*(is not the size of a section|cannot be read|tiles or strips, but \d+ are listed)",
        ):
            read(path)
