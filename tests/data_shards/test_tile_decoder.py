"""The decoder of many tiles returns the pixels and errors of the decoder of one tile, and does not open what it can decode directly."""

import io

import numpy as np
import pytest
from comtip_shards import ShardError
from comtip_shards.format import record, tile_decoder
from comtip_shards.format.record import decode_tile, encode_tile
from comtip_shards.format.tile_decoder import TileDecoder
from PIL import Image

PX = 24


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (PX, PX, 3)).astype(np.uint8)


def picture(codec: str = "jpeg", mode: str = "RGB", px: int = PX, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(noise(1)).resize((px, px)).convert(mode).save(out, codec.upper(), **options)
    return out.getvalue()


def two_pictures() -> bytes:
    out = io.BytesIO()
    Image.fromarray(noise(1)).save(out, "MPO", save_all=True, append_images=[Image.fromarray(noise(2))])
    return out.getvalue()


def here() -> str:
    return "here"


def outcome(decode) -> bytes | str:
    """Return the pixels of a tile, or the message of its error."""
    try:
        return np.ascontiguousarray(decode()[..., :3]).tobytes()
    except ShardError as error:
        return str(error)


def same_as_one_tile(decoder: TileDecoder, data: bytes, codec: str) -> bytes | str:
    """Check both methods of a decoder, and return the outcome."""
    want = outcome(lambda: decode_tile(data, PX, codec, "here"))
    into = np.zeros((PX, PX, 3), np.uint8)

    def decoded_into() -> np.ndarray:
        decoder.decode_into(into, data, here)
        return into

    assert outcome(lambda: decoder.decode(data, here)) == want
    assert outcome(decoded_into) == want
    return want


PLAIN = {
    "as written by a build": encode_tile(noise(0), "jpeg", 85),
    "fewer colours than pixels": picture(subsampling=2),
    "progressive": picture(progressive=True),
    "restart markers": picture(restart_marker_blocks=1),
}
OTHER = {
    "a comment": ("jpeg", picture(comment=b"x")),
    "a profile": ("jpeg", picture(icc_profile=b"x" * 200)),
    "RGB without conversion": ("jpeg", picture(keep_rgb=True)),
    "two pictures in a JPEG": ("jpeg", two_pictures()),
    "one channel": ("jpeg", picture(mode="L")),
    "four channels": ("jpeg", picture(mode="CMYK")),
    "another size": ("jpeg", picture(px=PX + 8)),
    "PNG": ("png", picture("png")),
    "WebP": ("webp", picture("webp")),
    "PNG instead of JPEG": ("jpeg", picture("png")),
    "nothing": ("jpeg", b""),
}


@pytest.mark.parametrize("turbo", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_jpeg_is_decoded_without_opening_it(name: str, turbo: bool, monkeypatch: pytest.MonkeyPatch):
    want = decode_tile(PLAIN[name], PX, "jpeg", "here")
    # Pillow's own answer may only be overridden to "no": without libjpeg-turbo, the other layout does not exist.
    known = tile_decoder.features.check_feature("libjpeg_turbo")
    monkeypatch.setattr(tile_decoder.features, "check_feature", lambda _: known and turbo)
    monkeypatch.setattr(record, "decode_tile", None)
    decoder, into = TileDecoder(PX, "jpeg"), np.zeros((PX, PX, 3), np.uint8)
    got = decoder.decode(PLAIN[name], here)
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got[..., :3], want)
    decoder.decode_into(into, PLAIN[name], here)
    np.testing.assert_array_equal(into, want)


@pytest.mark.parametrize("name", OTHER)
def test_any_other_tile_is_decoded_or_refused_as_before(name: str):
    codec, data = OTHER[name]
    same_as_one_tile(TileDecoder(PX, codec), data, codec)


def test_pixels_are_those_of_the_last_tile_and_share_one_memory():
    decoder = TileDecoder(PX, "jpeg")
    first = decoder.decode(PLAIN["progressive"], here)
    second = decoder.decode(PLAIN["as written by a build"], here)
    assert np.shares_memory(first, second)
    np.testing.assert_array_equal(second[..., :3], decode_tile(PLAIN["as written by a build"], PX, "jpeg", "here"))


def test_damaged_tiles_have_the_same_pixels_or_the_same_error():
    rng, decoder = np.random.default_rng(3), TileDecoder(PX, "jpeg")
    tiles = [*PLAIN.values(), *(data for codec, data in OTHER.values() if codec == "jpeg" and data)]
    outcomes = []
    for k in range(1500):
        data = bytearray(tiles[k % len(tiles)])
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(min(len(data), 650) if rng.random() < 0.7 else len(data)))
            kind = rng.integers(4)
            if kind == 0:
                data[at] = int(rng.integers(256))
            elif kind == 1:  # markers and lengths
                data[at] = int(rng.choice([0, 1, 0xFF, 0xC0, 0xD8, 0xD9, 0xDA, 0xE0, 0xEE]))
            elif kind == 2:
                del data[at : at + int(rng.integers(1, 20))]
            else:
                data[at:at] = rng.integers(0, 256, int(rng.integers(1, 20))).astype(np.uint8).tobytes()
            if len(data) < 4:
                break
        outcomes.append(same_as_one_tile(decoder, bytes(data), "jpeg"))
    decoded = sum(isinstance(one, bytes) for one in outcomes)
    assert 300 < decoded < 1200
