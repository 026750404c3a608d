"""Each check detects its own fault and no other, passes valid sections; report pages are self-contained and escaped."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from comtip_shards import ShardSet, SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.qc import check_section, check_source, check_sources
from comtip_shards.qc import context as look_module
from comtip_shards.qc.counts import join
from comtip_shards.qc.geometry import platform_pitch
from comtip_shards.qc.page import overlay, pages, ramp
from comtip_shards.qc.result import FAIL, NOT_APPLICABLE, OK, WARN, Finding, SectionReport, explain, graded
from comtip_shards.qc.run import _scalefactors, build_context
from comtip_shards.sections.section import Section
from comtip_shards.slides.pixel_scale import scale_length
from comtip_shards.sources import open_source
from PIL import Image
from scipy import sparse

from comtip_fast.cli import main
from testkit.section_faults import SECTION_FAULTS
from testkit.tiny import TinySection, write_tiny_source

SAMPLES = Path(__file__).parents[2] / "data_shards" / "samples"
SIZE = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0}


def alarms(report: SectionReport) -> set[str]:
    return {f.name for f in report.findings if f.status in (WARN, FAIL)}


def finding(report: SectionReport, name: str) -> Finding:
    return next(f for f in report.findings if f.name == name)


@pytest.fixture(scope="module")
def sound() -> Section:
    """Return a real olfactory bulb section, the fastest to read."""
    return open_source(SAMPLES, samples=["mob2k_1"])[0].read()


@pytest.fixture(scope="module")
def breast() -> Section:
    return open_source(SAMPLES, samples=["her2st_C4"])[0].read()


@pytest.fixture
def tiny(tmp_path: Path) -> Section:
    write_tiny_source(tmp_path / "s", [TinySection("a", "d", "train")])
    return open_source(tmp_path / "s")[0].read()


def test_pages_state_on_which_side_of_its_threshold_a_check_warns(sound: Section):
    found = [f for f in check_section(sound).findings if f.status == OK and f.threshold is not None]
    assert {"equal_totals", "stain", "blur", "background", "on_tissue", "scale"} <= {f.name for f in found}
    for f in found:
        side = "below" if f.figure >= f.threshold else "from"
        assert f.limit == f"{side} {f.threshold:g}", f.name


def test_sound_sections_raise_no_alarm(sound: Section, breast: Section):
    for section in (sound, breast):
        report = check_section(section)
        assert report.status == OK, report.lines
        assert NOT_APPLICABLE not in {f.status for f in report.findings}


@pytest.mark.parametrize("fault", SECTION_FAULTS)
def test_each_fault_is_found_by_its_check_alone(sound: Section, breast: Section, fault: str, tmp_path: Path):
    check, corrupt = SECTION_FAULTS[fault]
    # Bulb spots are so dense that squares around them leave no background in between.
    report = check_section(corrupt(breast if check == "background" else sound, tmp_path))
    assert alarms(report) == {check}, report.lines
    assert finding(report, check).advice


@pytest.mark.parametrize(
    "fault", ["x and y swapped", "mirrored within the bounding box of the spots", "corners of 112 um tiles as centres"]
)
def test_positions_are_judged_on_other_tissue_too(breast: Section, fault: str, tmp_path: Path):
    check, corrupt = SECTION_FAULTS[fault]
    assert alarms(check_section(corrupt(breast, tmp_path))) == {check}


def test_orientation_advises_what_to_do(sound: Section, tmp_path: Path):
    report = check_section(SECTION_FAULTS["mirrored across the image"][1](sound, tmp_path))
    assert "mirrored left to right" in finding(report, "orientation").message
    report = check_section(SECTION_FAULTS["x and y swapped"][1](sound, tmp_path))
    assert re.match("positions fit with x and y swapped", finding(report, "orientation").message)


def test_full_or_hires_gives_the_factor_and_its_name(sound: Section, tmp_path: Path):
    factors = {"tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.15, "spot_diameter_fullres": 20}
    (tmp_path / "scalefactors_json.json").write_text(json.dumps(factors))
    Image.fromarray(sound.load_image()).save(tmp_path / "image.png", compress_level=1)
    wrong = replace(sound, xy=sound.xy * 0.5, image_path=tmp_path / "image.png")
    found = finding(check_section(wrong), "full_or_hires")
    assert found.figure == pytest.approx(2, rel=0.01)
    assert "1 / tissue_hires_scalef" in found.message


def test_a_list_in_the_file_of_scale_factors_is_ignored(tmp_path: Path):
    (tmp_path / "scalefactors_json.json").write_text("[1]")
    assert _scalefactors(tmp_path / "image.png") == {}


def test_scale_names_the_factor_to_the_right_um_per_px(sound: Section):
    wrong = replace(sound, meta=replace(sound.meta, mpp=sound.meta.mpp * 2))
    found = finding(check_section(wrong), "scale")
    assert found.status == FAIL
    factor = float(re.search(r"\(`mpp`\) by ([\d.]+)", found.advice)[1])
    assert factor * wrong.meta.mpp == pytest.approx(sound.meta.mpp, rel=0.03)


def test_only_spots_without_counts_or_without_a_position_are_a_loss(tiny: Section):
    """Spots that a reader excludes for another reason, such as sparse pseudo-spots, have both."""
    excluded = {"not in tissue": 9, "no patch: too little tissue": 400, "pseudo-spots with under 5 cells": 900}
    found = join(SimpleNamespace(section=replace(tiny, dropped=excluded)))
    assert (found.status, found.message) == (OK, "every spot has counts and a position")
    lost = {"in the counts but without a position": 300, "table rows without a shape": 200}
    found = join(SimpleNamespace(section=replace(tiny, dropped=lost)))
    assert found.status == FAIL
    assert found.message == "300 spots in the counts but without a position; 200 table rows without a shape"


@pytest.mark.parametrize(
    ("platform", "pitch"),
    [("ST 1k array", 200.0), ("ST 2k array", 150.0), ("10x Visium", 100.0), ("Stereo-seq", None), ("VisiumHD", None)],
)
def test_the_name_of_a_platform_is_matched_by_words(platform: str, pitch: float | None):
    assert platform_pitch(platform) == pytest.approx(math.nan if pitch is None else pitch, nan_ok=True)


def test_scale_knows_the_platform(sound: Section):
    other = replace(sound, meta=replace(sound.meta, platform="10x Visium"))
    assert "10x Visium has 100" in finding(check_section(other), "scale").message
    unknown = replace(sound, meta=replace(sound.meta, platform="ours", spot_pitch_um=float("nan")))
    assert finding(check_section(unknown), "scale").status == NOT_APPLICABLE


@pytest.mark.parametrize("hexagonal", [False, True])
def test_spacing_is_right_in_spite_of_jitter_holes_and_strays(hexagonal: bool):
    rng = np.random.default_rng(0)
    i, j = (a.ravel() for a in np.meshgrid(np.arange(25.0), np.arange(25.0)))
    xy = np.column_stack([i + 0.5 * (j % 2) * hexagonal, j * (np.sqrt(3) / 2 if hexagonal else 1)]) * 30
    xy = xy[rng.random(len(xy)) > 0.2] + rng.normal(0, 1.5, (1, 2))
    xy += rng.normal(0, 1.5, xy.shape)
    xy = np.vstack([xy, rng.uniform(0, 750, (40, 2)), xy[:5]])
    assert look_module.lattice_pitch(xy) == pytest.approx(30, rel=0.03)


def test_a_section_that_fits_nothing_is_not_judged(tiny: Section):
    rng = np.random.default_rng(0)
    noise = sparse.csr_matrix(rng.poisson(4.0, (400, tiny.counts.shape[1])).astype(np.int32))
    xy = np.stack(np.meshgrid(np.linspace(20, 300, 20), np.linspace(20, 300, 20)), -1).reshape(-1, 2)
    section = replace(tiny, counts=noise, xy=xy, spot_ids=[str(i) for i in range(400)], array_xy=xy, labels=[""] * 400)
    assert finding(check_section(section), "orientation").status == NOT_APPLICABLE


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 120, 180)])
@pytest.mark.parametrize("n", [1, 3, 49])
def test_no_section_is_too_odd_to_report_on(tiny: Section, tmp_path: Path, colour: tuple[int, int, int], n: int):
    Image.new("RGB", (321, 319), colour).save(tmp_path / "flat.png")
    rows = slice(0, n)
    section = replace(
        tiny,
        image_path=tmp_path / "flat.png",
        counts=tiny.counts[rows],
        xy=tiny.xy[rows],
        spot_ids=tiny.spot_ids[rows],
        array_xy=tiny.array_xy[rows],
        labels=tiny.labels[rows],
        meta=replace(tiny.meta, spot_diameter_um=float("nan"), spot_pitch_um=float("nan")),
    )
    report = check_section(section)
    assert len(report.findings) == 13
    json.loads(report.to_json())


def test_explain_names_the_cause_and_keeps_what_was_measured():
    def one(name: str, status: str) -> Finding:
        return Finding(name=name, status=status, message=f"{name} measured", spots=(1,))

    causes = [("a", ["b", "c"]), ("b", ["c"])]
    out = {f.name: f for f in explain([one("c", WARN), one("b", FAIL), one("a", OK)], causes)}
    assert [out[n].status for n in "abc"] == [OK, FAIL, NOT_APPLICABLE]
    assert out["c"].message == "cannot be assessed until b is fixed (measured: c measured)"
    assert out["c"].spots == ()


def test_thresholds_work_both_ways_up():
    assert [graded("x", v, 0.9, 0.6, "", "do").status for v in (0.95, 0.7, 0.5)] == [OK, WARN, FAIL]
    assert [graded("x", v, 0.1, 0.3, "", "do").status for v in (0.05, 0.1, 0.3)] == [OK, WARN, FAIL]


def test_ramp_is_dark_for_few_and_bright_for_many():
    colours = ramp(np.arange(100.0))
    assert colours[0].tolist() == [68, 1, 84]
    assert colours[-1].tolist() == [253, 231, 37]
    assert ramp(np.ones(3)).shape == (3, 3)


def test_the_page_states_the_counts_at_the_ends_of_the_colours(tiny: Section):
    report = check_section(tiny)
    low, high = np.quantile(np.asarray(tiny.counts.sum(1)).ravel(), [0.02, 0.98])
    found = report.facts["counts_per_spot"]
    assert list(found.values()) == pytest.approx([low, high], rel=0.02)
    caption = re.search(r"Total counts per spot, (\d+) <span.*?</span> (\d+)\n", pages(report)["html"])
    assert caption is not None
    assert [int(v) for v in caption.groups()] == list(found.values())
    for hostile in (None, "text", {"other": 1}):  # an older report, or one that was changed
        html = pages(replace(report, facts=report.facts | {"counts_per_spot": hostile}))["html"]
        assert re.search(r"Total counts per spot, few <span.*</span> many\n", html)


def test_the_overlay_has_a_scale_bar(tiny: Section):
    with tiny.open_slide() as slide:
        context = build_context(tiny, slide, 224.0)
    pixels = np.asarray(Image.open(io.BytesIO(overlay(context, []))).convert("L"))
    width_um = pixels.shape[1] * context.mpp * context.picture_HW3.shape[1] / pixels.shape[1]
    row = pixels[round(0.97 * pixels.shape[0]) - 2] < 40
    assert row.sum() * width_um / pixels.shape[1] == pytest.approx(scale_length(width_um), rel=0.03)
    assert row[: len(row) // 2].any()


def test_pages_are_self_contained_and_escaped(tiny: Section):
    hostile = "<script>alert(1)</script>"
    meta = replace(tiny.meta, tissue=hostile, donor=hostile)
    report = check_section(replace(tiny, meta=meta, spot_ids=[hostile, *tiny.spot_ids[1:]], notes=[hostile]))
    html = pages(report)["html"]
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html)
    assert "default-src 'none'" in html
    data = json.loads(pages(report)["json"])
    assert (data["format"], data["version"]) == ("comtip-section-report", 1)
    assert [f["name"] for f in data["findings"]] == [f.name for f in report.findings]


def test_overlay_rings_the_spots_of_a_failed_check(tiny: Section):
    with tiny.open_slide() as slide:
        context = build_context(tiny, slide, 224.0)
    findings = [
        Finding(name="a", status=FAIL, message="", spots=tuple(range(10))),
        Finding(name="b", status=OK, message="", spots=(12,)),
    ]
    pixels = np.asarray(Image.open(io.BytesIO(overlay(context, findings))).convert("RGB")).astype(int)

    def red(xy: np.ndarray) -> bool:
        x, y = xy.round().astype(int)
        part = pixels[y - 14 : y + 15, x - 14 : x + 15].reshape(-1, 3)
        return bool((np.abs(part - [220, 30, 30]).max(1) < 60).any())

    assert [red(xy) for xy in tiny.xy[:14]] == [True] * 10 + [False] * 4


def test_what_cannot_be_read_becomes_a_finding(tmp_path: Path):
    write_tiny_source(tmp_path / "s", [TinySection("a", "d", "train"), TinySection("b", "d", "train")], side=3)
    Image.new("RGB", (10, 10)).save(tmp_path / "s/a.png")
    reports = check_sources(open_source(tmp_path / "s"), tmp_path / "out")
    assert [r.findings[0].name for r in reports] == ["read", "join"]
    assert "spots lie outside" in reports[0].findings[0].message
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.json", "a.html", "b.json", "b.html", "index.html"}
    assert "spots lie outside" in (tmp_path / "out/a.html").read_text()
    assert check_source(open_source(tmp_path / "s")[0]).status == FAIL
    check_sources(open_source(tmp_path / "s", samples=["b"]), tmp_path / "out")  # it replaces its own files
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"b.json", "b.html", "index.html"}
    for name in ("thesis.txt", "settings.json"):
        (tmp_path / "out" / name).write_text("mine")
        with pytest.raises(SourceError, match=rf"other files \({name}\)"):
            check_sources(open_source(tmp_path / "s"), tmp_path / "out")
        (tmp_path / "out" / name).unlink()


def test_a_build_reports_and_under_strict_refuses(tmp_path: Path):
    write_tiny_source(tmp_path / "s", [TinySection("a", "d", "train"), TinySection("b", "e", "test")], side=4)
    purple = np.asarray(Image.open(tmp_path / "s/a.png")) * [0.8, 1.0, 1.0]  # more like haematoxylin and eosin
    Image.fromarray(purple.astype(np.uint8)).save(tmp_path / "s/a.png")
    Image.open(tmp_path / "s/b.png").convert("L").convert("RGB").save(tmp_path / "s/b.png")
    out = tmp_path / "out"
    with pytest.raises(
        SourceError, match=r"`strict`: sections that fail checks: 1; fix them .*\n  b: stain: grey.*`image`"
    ):
        build_shards(open_source(tmp_path / "s"), out, strict=True, **SIZE)
    assert (out / "report/b.html").is_file()
    assert not (out / "manifest.json").exists()
    report = build_shards(open_source(tmp_path / "s"), out, **SIZE)
    assert "check stain: fail: grey" in report.text
    source = ShardSet(out).manifest.sections[1].source
    assert {f["name"]: f["status"] for f in source["checks"]}["stain"] == FAIL
    assert any(note.startswith("check stain: fail") for note in source["notes"])
    assert {p.name for p in (out / "report").iterdir()} == {"a.json", "a.html", "b.json", "b.html", "index.html"}
    with pytest.raises(SourceError, match="`strict`"):  # also if the set is already built
        build_shards(open_source(tmp_path / "s"), out, strict=True, **SIZE)


def test_the_command_writes_pages_and_under_strict_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_tiny_source(tmp_path / "s", [TinySection("a", "d", "train")], side=4)
    Image.open(tmp_path / "s/a.png").convert("L").convert("RGB").save(tmp_path / "s/a.png")
    words = ["shards", "check", str(tmp_path / "s"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "a: fail\n  check stain: fail: grey" in output
    assert (tmp_path / "out/index.html").is_file()
    assert main([*words, "--strict"]) == 1


def test_a_real_picture_that_is_not_he_is_reported_and_scattered_spots_have_no_scale(tmp_path: Path):
    folder = Path(__file__).parent / "fixtures" / "space_ranger"
    facts = {"tissue": "placenta", "species": "mouse", "image": "lowres"}
    (eosin,) = open_source(folder / "visium_sr3_mex", overrides=facts)
    assert alarms(check_source(eosin)) == {"stain"}
    (scattered,) = open_source(folder / "visium_sr1_h5", overrides=facts | {"species": "human", "tissue": "heart"})
    report = check_source(scattered)
    assert finding(report, "scale").message == "spots are not on a lattice"
    assert finding(report, "stain").status == OK
