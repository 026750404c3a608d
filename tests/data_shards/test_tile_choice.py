"""Without options, tiles have the field's size where the images have it; the cost of a common scale is stated."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from comtip_shards import ShardSet, SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.builder.tile_choice import choose_tile, scale_cost, tile_text
from comtip_shards.sources import open_source

from comtip_fast.cli import main
from testkit.tiny import TinySection, write_tiny_source


def scaled(*mpp: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(section_id=f"s{i}", mpp=m) for i, m in enumerate(mpp)]


DEFAULTS = {
    "scanner at 40x": ((0.25, 0.25), (224, 112.0, 0.5)),
    "scanner at 20x": ((0.5,), (224, 112.0, 0.5)),
    "20x and 40x, which tiles show alike": ((0.25, 0.5), (224, 112.0, 0.5)),
    "slightly coarser": ((0.52,), (224, 112.0, 0.52)),
    "10x": ((1.0,), (128, 112.0, 1.0)),
    "hires of Visium": ((3.3,), (64, 112.0, 3.3)),
    "coarse": ((4.7, 4.75), (32, 112.0, 4.7)),
    "20x and 10x": ((0.25, 1.0), (128, 112.0, 1.0)),
    "no section": ((), (224, 112.0, 0.5)),
}


@pytest.mark.parametrize("case", DEFAULTS)
def test_the_default_is_the_tile_of_the_field_or_the_nearest_that_the_images_have(case: str):
    mpp, (px, um, min_mpp) = DEFAULTS[case]
    tile = choose_tile(scaled(*mpp))
    assert (tile.px, tile.um, tile.min_mpp) == (px, um, min_mpp)
    # Upsampled at most by the step of px, and never blurred below what the coarsest section has.
    coarsest = max(*mpp, 0.5) if mpp else 0.5
    assert tile.um / tile.px <= 1.06 * coarsest
    assert tile.min_mpp <= coarsest + 1e-9


def test_stated_values_are_used():
    assert choose_tile(scaled(0.25), um=224.0).px == 224
    assert choose_tile(scaled(0.25), um=224.0).min_mpp == 1.0
    assert choose_tile(scaled(0.25), px=64).um == 112.0
    demo = choose_tile(scaled(2.0, 4.73), px=128, um=224.0, min_mpp=4.0)
    assert (demo.px, demo.um, demo.min_mpp) == (128, 224.0, 4.0)
    for bad in ({"px": 0}, {"px": 5000}, {"um": 0.0}, {"um": float("nan")}, {"min_mpp": 0.0}, {"codec": "gif"}):
        with pytest.raises(SourceError, match=r"out of range|`codec` .gif. is unknown"):
            choose_tile(scaled(0.5), **bad)


def test_the_cost_is_stated_section_by_section():
    sections = scaled(0.25, 0.5, 1.0)
    lines = tile_text(sections, choose_tile(sections))
    assert lines[0] == "tiles of 112 um in 128 px (0.875 um/px), images not finer than 1 um/px"
    assert lines[1] == "  s0: 0.25 um/px, blurred to 1: one resolved px covers 1.3 px of the tile"
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == ["s0", "s1"]
    assert "`min_mpp`" in lines[-1]
    alike = scaled(0.25, 0.5)
    assert len(tile_text(alike, choose_tile(alike))) == 1
    # The lowres image of a Visium run: the smallest default tile has 32 px, so the image is upsampled.
    assert (
        tile_text(low := scaled(16.1), choose_tile(low))[1]
        == "  s0: 16.1 um/px: one px of the image covers 21.2 px of the tile"
    )
    old = choose_tile(scaled(0.25), px=128, um=224.0, min_mpp=4.0)
    assert scale_cost(scaled(0.25)[0], old) == "0.25 um/px, blurred to 4: one resolved px covers 5.2 px of the tile"
    assert "resampled to the tile's 1.75: finer detail is lost" in str(
        scale_cost(scaled(0.25)[0], choose_tile([], px=128, um=224.0))
    )


def test_a_build_without_options_keeps_what_the_image_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_tiny_source(tmp_path / "in", [TinySection("fine", "d", "train")], pitch_px=100).parent  # 2 um per px
    assert main(["shards", "build", str(source), "--out", str(tmp_path / "set")]) == 0
    tile = ShardSet(tmp_path / "set").manifest.tile
    assert (tile.px, tile.um, tile.min_mpp) == (64, 112.0, 2.0)
    out = capsys.readouterr().out
    assert "blurred" not in out
    pages = tmp_path / "set" / "report" / "index.html"
    assert f"pages of the checks: {pages}\n" in out
    assert pages.is_file()
    other = write_tiny_source(tmp_path / "two", [TinySection("coarse", "e", "train")], seed=1).parent  # 5 um per px
    sources = [*open_source(source), *open_source(other)]
    report = build_shards(sources, tmp_path / "both")
    assert ShardSet(tmp_path / "both").manifest.tile.min_mpp == 5.0
    assert "fine: 2 um/px, blurred to 5" in report.text
    assert "coarse: " not in report.text.split("sections,")[0]
