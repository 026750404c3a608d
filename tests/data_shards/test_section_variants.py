"""Sound sections in another exposure, lamp or stain density raise no alarm; another kind of picture is reported as such.

All sections and variants: ``bench/shards/calibrate_checks.py --variants``.
"""

from pathlib import Path

import pytest
from comtip_shards.qc import check_section, geometry, picture
from comtip_shards.qc.result import FAIL, WARN
from comtip_shards.qc.run import build_context
from comtip_shards.sections.section import Section
from comtip_shards.slides.tiles import FIELD_UM
from comtip_shards.sources import open_source

from testkit.section_faults import SECTION_FAULTS
from testkit.section_variants import SECTION_VARIANTS

SAMPLES = Path(__file__).parents[2] / "data_shards/samples"
CHECKS = (picture.stain, picture.blur, picture.background, geometry.on_tissue)
TRIED = ("exposure 30 %", "exposure 105 %", "warm lamp", "stain at 50 %", "tissue fills the frame, exposure 45 %")


@pytest.fixture(scope="module")
def pale() -> Section:
    """Return the palest sample section, whose image is the smallest."""
    return open_source(SAMPLES, samples=["mob2k_3"])[0].read()


@pytest.mark.parametrize("name", TRIED)
def test_a_variant_raises_no_alarm(pale: Section, name: str, tmp_path: Path):
    section = SECTION_VARIANTS[name][1](pale, tmp_path)
    with section.open_slide() as slide:
        context = build_context(section, slide, FIELD_UM)
    found = [check(context) for check in CHECKS]
    assert [f.line for f in found if f.status in (WARN, FAIL)] == []


@pytest.mark.parametrize(
    ("sample", "variant", "fault"),
    [
        ("her2st_C3", None, "30 % of the spots on background"),  # glass that eosin has stained
        ("mob2k_1", None, "tissue cut out, background white"),  # gaps that the tissue mask closes
        ("mob2k_4", "exposure 30 %", "blurred by 10 um"),  # rounding is stronger than the edges that are left
        (
            "her2st_C4",
            "stain at 50 %",
            "positions in px of the hires image (0.17)",
        ),  # a weak fit that the spacing confirms
        ("her2st_C2", "tissue fills the frame", "x and y swapped"),  # positions shrunk to a few px fit better
    ],
)
def test_a_fault_is_found_in_a_difficult_section(sample: str, variant: str | None, fault: str, tmp_path: Path):
    section = open_source(SAMPLES, samples=[sample])[0].read()
    if variant is not None:
        section = SECTION_VARIANTS[variant][1](section, tmp_path)
    (tmp_path / "fault").mkdir()
    check, corrupt = SECTION_FAULTS[fault]
    report = check_section(corrupt(section, tmp_path / "fault"))
    assert check in {f.name for f in report.findings if f.status in (WARN, FAIL)}


def test_fluorescence_is_another_stain(pale: Section, tmp_path: Path):
    section = SECTION_VARIANTS["fluorescence (nuclei and autofluorescence)"][1](pale, tmp_path)
    report = check_section(section)
    assert [f.name for f in report.findings if f.status in (WARN, FAIL)] == ["stain"]
    assert "pure colours on black" in report.lines[0]
