"""Sound sections in another exposure, lamp or stain density raise no alarm; another kind of picture is reported as such.

All sections and variants: ``bench/shards/calibrate_checks.py --variants``.
"""

from pathlib import Path

import pytest
from comtip_shards.qc import geometry, picture
from comtip_shards.qc.result import FAIL, WARN
from comtip_shards.qc.run import build_context
from comtip_shards.sections.section import Section
from comtip_shards.slides.tiles import FIELD_UM
from comtip_shards.sources import open_source

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
