"""A tenfold wrong scale is refused where a file, an array or the size of the image shows it; correct sections pass."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from comtip_shards import SourceError
from comtip_shards.sections.section import Section
from comtip_shards.slides.pixel_scale import check_side, check_stated_mpp
from comtip_shards.sources import SectionSource, open_source
from comtip_shards.sources.geometry import ScaleCheck, platform_pitch

from testkit.hest import HestSection, write_hest

SAMPLES = Path(__file__).parents[2] / "data_shards/samples"


@pytest.fixture(scope="module")
def samples() -> list[Section]:
    return [source.read() for source in open_source(SAMPLES)]


def scaled(section: Section, factor: float) -> Section:
    return replace(section, meta=replace(section.meta, mpp=section.meta.mpp * factor))


def test_no_sample_section_is_refused_at_its_own_scale(samples: list[Section], caplog: pytest.LogCaptureFixture):
    assert len(samples) > 8
    for section in samples:
        ScaleCheck(section.meta.mpp, trusted=False)(section)
    assert caplog.text == ""


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_every_sample_section_is_refused_at_a_tenth_and_ten_times_its_scale(samples: list[Section], factor: float):
    for section in samples:
        wrong = scaled(section, factor)
        with pytest.raises(SourceError, match=r"the spots are [\d.e+]+ um apart, but .*`trust_mpp=yes`") as error:
            ScaleCheck(wrong.meta.mpp, trusted=False)(wrong)
        stated = float(str(error.value).split("which gives ")[1].split()[0])
        assert stated == pytest.approx(section.meta.mpp, rel=0.1)  # neighbours are nearer than the pitch by up to 7 %
        ScaleCheck(wrong.meta.mpp, trusted=True)(wrong)


def test_few_spots_of_a_dense_array_are_not_refused(samples: list[Section]):
    """A selection of every third spot has larger distances than the array."""
    for section in samples:
        mask = np.arange(len(section.spot_ids)) % 3 == 0
        ScaleCheck(section.meta.mpp, trusted=False)(section.keep(mask, "other"))


def test_a_manifest_is_checked_when_it_is_read(tmp_path: Path):
    """Against the pitch that it states; a manifest without one is checked against its platform only."""
    with pytest.raises(SourceError, match=r"section mob_Rep4: .*apart, but the spot pitch of the section is 200 um"):
        open_source(SAMPLES, samples=["mob_Rep4"], overrides={"mpp": "27.5"})[0].read()
    section = open_source(SAMPLES, samples=["mob_Rep4"], overrides={"mpp": "27.5", "trust_mpp": "yes"})[0].read()
    assert section.meta.mpp == 27.5
    assert isinstance(open_source(SAMPLES, samples=["mob_Rep4"])[0], SectionSource)


def test_the_metadata_of_hest_decide(tmp_path: Path):
    own = 0.7
    folder = write_hest(tmp_path / "hest", [HestSection("TENX2", technology="Xenium", organ="Lung", mpp=own)])
    with pytest.raises(SourceError, match=r"`mpp` 7 is 10 times the 0\.7 um per px that the metadata of HEST states"):
        open_source(folder, overrides={"mpp": str(own * 10)})
    assert open_source(folder, overrides={"mpp": str(own * 1.01)})[0].meta.mpp == pytest.approx(own * 1.01)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_the_tag_of_the_image_decides(samples: list[Section], tmp_path: Path, factor: float):
    """Here the positions have no known pitch: a platform without one, and a pitch derived from the scale."""
    section = samples[0]
    pixels = np.full((400, 500, 3), 200, np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, photometric="rgb", resolution=(5000, 5000), resolutionunit="CENTIMETER"
    )
    meta = replace(section.meta, mpp=2.0, platform="MERFISH", spot_pitch_um=float("nan"))
    own = replace(section, meta=meta, image_path=tmp_path / "a.tif")
    ScaleCheck(2.0, trusted=False)(own)
    with pytest.raises(SourceError, match=r"times the 2 um per px that a\.tif states; correct `mpp`"):
        ScaleCheck(2.0 * factor, trusted=False)(scaled(own, factor))
    ScaleCheck(2.0 * factor, trusted=True)(scaled(own, factor))
    ScaleCheck(None, trusted=False)(scaled(own, factor))  # the scale is the source's own: the tag may be a default


def test_a_smaller_difference_is_a_warning(caplog: pytest.LogCaptureFixture):
    check_stated_mpp(0.5, 0.52, "a.tif", "a", trusted=False)
    check_stated_mpp(0.5, None, "a.tif", "a", trusted=False)
    assert caplog.text == ""
    check_stated_mpp(0.5, 0.25, "a.tif", "a", trusted=False)
    assert "a: `mpp` 0.5 is used, but a.tif states 0.25 um per px" in caplog.text


def test_an_image_larger_than_any_slide_is_refused():
    check_side((100_000, 60_000), 0.5, "a", trusted=False)
    with pytest.raises(SourceError, match="a: at 5 um per px the image is 500 mm wide or high, more than any slide"):
        check_side((100_000, 60_000), 5.0, "a", trusted=False)
    check_side((100_000, 60_000), 5.0, "a", trusted=True)


@pytest.mark.parametrize(
    ("platform", "pitch"),
    [("Visium", 100), ("10x Visium CytAssist (11 mm)", 100), ("ST 1k array (legacy Spatial Transcriptomics)", 200), ("ST 2k array", 150),
     ("Visium HD", None), ("VisiumHD", None), ("Stereo-seq", None), ("STARmap", None), ("STOmics", None), ("Xenium", None), ("", None)],
)  # fmt: skip
def test_a_platform_is_known_by_whole_words(platform: str, pitch: float | None):
    found = platform_pitch(platform)
    assert found == pitch if pitch is not None else np.isnan(found)


def test_legacy_arrays_take_a_trusted_scale(tmp_path: Path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("C2.tsv.gz", "C2_HE.jpg", "C2_spots.tsv"):
        shutil.copy(SAMPLES / "her2st" / name, folder)
    facts = {"species": "human", "tissue": "breast", "mpp": "20"}
    with pytest.raises(SourceError, match="or set `trust_mpp=yes` for an array of another pitch"):
        open_source(folder, overrides=facts)
    assert open_source(folder, overrides=facts | {"trust_mpp": "yes"})[0].meta.mpp == 20.0
