"""What is read of a file is bounded: holes, endless files, claimed blocks; and no message names a temporary copy."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import struct
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.sections.benchmark import load_benchmark
from comtip_shards.slides import bounded_file
from comtip_shards.slides.bounded_file import BoundedFile
from comtip_shards.slides.colour import RGB as RGB_TAG
from comtip_shards.slides.colour import tiff_decoder
from comtip_shards.slides.open import image_size, is_image, open_slide
from comtip_shards.slides.tiff_tags import check_tiff_tags
from comtip_shards.sources import open_source
from comtip_shards.sources.files import opening, packaging
from comtip_shards.sources.files.opening import input_sha256
from comtip_shards.sources.files.packaging import unpacked
from comtip_shards.sources.files.table_size import MAX_LINE
from comtip_shards.sources.files.tables import read_counts_table
from comtip_shards.study.headers import _table, _zarr_table
from PIL import Image

from testkit.tiny import write_tiny_source

RGB = Image.effect_noise((300, 200), 60).convert("RGB")


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    RGB.save(out, kind)
    return out.getvalue()


def hole(path: Path, start: bytes, size: int = 1 << 40) -> Path:
    """Write ``start`` and extend the file by a hole, which takes no space on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def tiff_tag(count: int, kind: int = 2, tag: int = 270) -> bytes:
    """Return a TIFF of which a tag (the description by default) claims ``count`` values."""
    tags = [
        (256, 4, 1, 16),
        (257, 4, 1, 16),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (tag, kind, count, 8),
        (273, 4, 1, 8),
    ]
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + struct.pack("<I", 0)


HOLES = {
    "jpeg cut in its header": ("a.jpg", lambda: encoded("JPEG")[:200]),
    "jpeg cut in its scan": ("a.jpg", lambda: encoded("JPEG")[:-2000]),
    "jpeg under another name": ("a.tif", lambda: encoded("JPEG")[:200]),
    "gif": ("a.png", lambda: encoded("GIF")[:-1]),
    "png": ("a.png", lambda: encoded("PNG")[:100]),
    "png with a text of 2 GB": ("a.png", lambda: encoded("PNG")[:33] + b"\x7f\xff\xff\xffzTXt"),
    "webp": ("a.webp", lambda: encoded("WEBP")[:100]),
    "bmp": ("a.bmp", lambda: encoded("BMP")[:1000]),
    "jpeg 2000": ("a.jp2", lambda: encoded("JPEG2000")[:200]),
    "tiff with a tag of 4 GB": ("a.tif", lambda: tiff_tag(2**32 - 1)),
    "tiff with offsets of 4 GB": ("a.tif", lambda: tiff_tag(2**30, kind=4, tag=324)),
    "tiff": ("a.tif", lambda: encoded("TIFF")[:4000]),
    "scanner file": ("a.svs", lambda: encoded("TIFF")[:4000]),
}


@pytest.mark.parametrize("name", HOLES)
def test_an_image_that_ends_in_a_hole_is_read_or_refused_by_name(name: str, tmp_path: Path):
    """Never searched to its end: a terabyte takes hours."""
    file, start = HOLES[name]
    path = hole(tmp_path / file, start())
    began = time.process_time()
    try:
        with open_slide(path) as slide:
            assert slide.overview(64)[0].shape[2] == 3
    except SourceError as error:
        assert file in str(error)  # noqa: PT017  (both outcomes are right)
    assert time.process_time() - began < 15


def page(offset: int, tags: list[tuple[int, int, int, int]], following: int, layout: str) -> bytes:
    """Return a page of a TIFF whose layout is classic, ndpi (offsets of pages with 64 bits) or big, after a hole."""
    count, entry, last = {"classic": ("H", "HHII", "I"), "ndpi": ("H", "HHII", "Q"), "big": ("Q", "HHQQ", "Q")}[layout]
    body = struct.pack(f"<{count}", len(tags)) + b"".join(struct.pack(f"<{entry}", *tag) for tag in tags)
    return bytes(offset) + body + struct.pack(f"<{last}", following)


def test_offsets_of_64_bits_of_an_ndpi_slide_are_followed(tmp_path: Path):
    """A slide above 4 GiB has no page where the lower 32 bits of an offset point: bytes there claim any size."""
    path, far = tmp_path / "slide.ndpi", (1 << 32) + 4096
    start = b"II*\0" + struct.pack("<Q", far)
    hole(path, start + page(4096 - 12, [(513, 4, 0x9000_0000, 1)], 0, "classic"), far + 4096)
    for claimed, refused in ((1, False), (0x9000_0000, True)):
        with path.open("r+b") as file:
            file.seek(far)
            file.write(page(0, [(65449, 4, claimed, 1)], 0, "ndpi"))
        if refused:
            with pytest.raises(SourceError, match="the tag 65449 of a page claims"):
                check_tiff_tags(path)
        else:
            check_tiff_tags(path)


@pytest.mark.parametrize(
    ("tag", "following"),
    [((256, 4, 1, 5), 2**63 + 5), ((256, 4, 1, 5), 2**62), ((330, 4, 2, 16 | 0x9000_0000 << 32), 0)],
    ids=["page beyond any file", "page beyond the file", "two inner pages in the tag itself"],
)
def test_offsets_outside_a_tiff_are_left_to_the_libraries(
    tmp_path: Path, tag: tuple[int, int, int, int], following: int
):
    path = tmp_path / "a.tif"
    path.write_bytes(b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) + page(0, [tag], following, "big"))
    check_tiff_tags(path)


def test_inner_pages_whose_offsets_are_in_the_tag_itself_are_checked(tmp_path: Path):
    path = tmp_path / "a.tif"
    first = page(0, [(330, 4, 2, 64 | 128 << 32)], 0, "big")
    second = page(128 - 16 - len(first), [(324, 16, 1 << 40, 1)], 0, "big")
    path.write_bytes(b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) + first + second)
    with pytest.raises(SourceError, match="the tag 324 of a page claims"):
        check_tiff_tags(path)


def test_the_case_of_the_fuzzer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = hole(tmp_path / "S1_HE.jpg", encoded("JPEG")[:200])
    with pytest.raises(SourceError, match=r"S1_HE\.jpg: the image has no end, .* in a file of 1,099,511,627,776 bytes"):
        image_size(path)
    monkeypatch.setattr(bounded_file, "HEADER_BYTES", 10_000)
    (tmp_path / "b.jpg").write_bytes(encoded("JPEG"))
    with BoundedFile(tmp_path / "b.jpg") as file:
        file.read(5000)
        with pytest.raises(SourceError, match=r"b\.jpg: .*or its header states a block of 6,000 bytes"):
            file.read(6000)


def test_no_program_is_started_for_an_image(tmp_path: Path):
    """Pillow runs Ghostscript for EPS, whatever the suffix."""
    (tmp_path / "a.tif").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n")
    with pytest.raises(SourceError, match=r"a\.tif: "):
        open_slide(tmp_path / "a.tif")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.tif").read_bytes())
    with pytest.raises(SourceError, match=r"a\.png: not an image that can be read.*none of TIFF, PNG, JPEG"):
        open_slide(tmp_path / "a.png")


def test_images_are_known_by_their_first_bytes(tmp_path: Path):
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "JPEG2000"):
        (tmp_path / "a.dat").write_bytes(encoded(kind))
        assert is_image(tmp_path / "a.dat")
    (tmp_path / "a.dat").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
    assert not is_image(tmp_path / "a.dat")
    assert not is_image(tmp_path)


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path: Path):
    counts = hole(tmp_path / "a.tsv", b"\tERBB2\tCD74\n"[:-1], 3 * MAX_LINE)
    with pytest.raises(SourceError, match=r"a\.tsv: the first line has more than 67,108,864 bytes"):
        read_counts_table(counts)
    assert _table(hole(tmp_path / "b.csv", b"barcode,in_tissue\nA,1\n", 3 * MAX_LINE)) == {}
    (tmp_path / "tables/t/X").mkdir(parents=True)
    with pytest.raises(OSError, match="bytes"):
        _zarr_table(hole(tmp_path / "tables/t/X/zarr.json", b"{"))
    with pytest.raises(SourceError, match=r"c\.txt: cannot be read as a list of benchmark ids"):
        load_benchmark(hole(tmp_path / "c.txt", b"TENX1\n"))


# -- temporary copies ----------------------------------------------------------------------------------------------------


def packed_image(folder: Path) -> Path:
    (folder / "he.png.gz").write_bytes(gzip.compress(encoded("PNG")[:900]))
    return folder / "he.png.gz"


def test_a_message_names_the_packed_file_and_not_its_copy(tmp_path: Path):
    path = packed_image(tmp_path)
    copy = unpacked(path)
    for read in (open_slide, image_size):
        try:
            read(copy)
        except SourceError as error:
            text = str(error)
            assert text.startswith(f"{path}: ")
            assert "comtip-unpacked" not in text


def broken_h5(folder: Path) -> bytes:
    with h5py.File(folder / "x.h5", "w") as file:
        file["x"] = np.arange(3)
    return (folder / "x.h5").read_bytes()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_a_member_of_an_archive_is_named_with_its_archive(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    with tarfile.open(folder / "filtered_feature_bc_matrix.tar.gz", "w:gz") as archive:
        for name in ("matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"):
            add(archive, f"filtered_feature_bc_matrix/{name}", gzip.compress(b"no matrix\n"))
    with tarfile.open(folder / "spatial.tar.gz", "w:gz") as archive:
        add(archive, "spatial/tissue_positions.csv", b"barcode,in_tissue\nA,1\n")
        add(archive, "spatial/scalefactors_json.json", b"{}")
        add(archive, "spatial/tissue_hires_image.png", encoded("PNG"))
    with pytest.raises(SourceError) as error:
        open_source(folder, overrides={"tissue": "heart", "image": "hires"})[0].read()
    text = str(error.value)
    assert "comtip-unpacked" not in text
    assert f"{folder}/spatial.tar.gz/spatial/tissue_positions.csv" in text


def test_an_error_of_the_disk_is_no_damage_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packaging, "_copy", full)
    with pytest.raises(OSError, match=r"No space left on device for temporary copies \(.*TMPDIR") as error:
        unpacked(packed_image(tmp_path))
    assert not isinstance(error.value, SourceError)
    assert error.value.errno == errno.ENOSPC


WRAPPED: dict[str, Callable[[Path], bytes]] = {"h5": broken_h5, "text": lambda folder: b"not hdf5"}


@pytest.mark.parametrize("kind", WRAPPED)
def test_an_error_of_a_library_names_the_packed_file(tmp_path: Path, kind: str):
    path = tmp_path / "a.h5ad.gz"
    path.write_bytes(gzip.compress(WRAPPED[kind](tmp_path)))
    with pytest.raises(SourceError, match=r"a\.h5ad\.gz") as error:
        open_source(path, fmt="anndata", overrides={"tissue": "x"})[0].read()
    assert "comtip-unpacked" not in str(error.value)


def test_a_file_with_a_large_hole_is_not_hashed(tmp_path: Path):
    """1 TB of zeros take an hour; a reader may accept the file, because HDF5 ignores what follows its data."""
    path = hole(tmp_path / "counts.h5ad", b"x" * 300)
    with pytest.raises(SourceError, match=r"counts.h5ad: 1,099,511,\d{3},\d{3} of its 1,099,511,627,776 bytes were"):
        input_sha256(path)


def test_a_build_does_not_hash_an_image_of_a_terabyte(tmp_path: Path):
    source = write_tiny_source(tmp_path / "source").parent
    image = next(p for p in sorted(source.rglob("*")) if is_image(p))
    with image.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(SourceError, match=f"{image.name}: .*1,099,511,627,776 bytes"):
        build_shards(open_source(source), tmp_path / "set", tile_px=32, tile_um=224.0, min_mpp=5.0)


def test_a_small_hole_is_hashed(tmp_path: Path):
    path = hole(tmp_path / "a.bin", b"abc", 1 << 20)
    assert input_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "MAX_HOLE", 1 << 19)
        with pytest.raises(SourceError, match="were never written"):
            input_sha256(path)
        path.write_bytes(bytes(1 << 20))  # the same content, written
        assert input_sha256(path) == hashlib.sha256(bytes(1 << 20)).hexdigest()


@pytest.mark.parametrize("bits", [3_000_000_000, 0])
def test_bits_per_sample_out_of_range_are_refused(bits: int):
    """2 to the power of a damaged number of bits took minutes and gigabytes."""
    page = SimpleNamespace(photometric=RGB_TAG, compression=1, bitspersample=(8, 8, bits) if bits else 0)
    with pytest.raises(SourceError, match=r"a\.tif: [\d,]+ bits per sample, expected 1 to 64"):
        tiff_decoder(page, "a.tif")
