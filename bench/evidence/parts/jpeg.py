"""Part ``jpeg``: comparison of nvJPEG (torchvision) and DALI with libjpeg on the CPU, in decoding tiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from comtip_shards.format.record import encode_tile
from torch import Tensor

from bench.evidence.cases import why_not
from bench.evidence.rows import Row, Rows
from comtip_fast.data.loaders.dali import Decoder

LARGEST_MEAN = 2.0
"""Maximum mean difference from libjpeg in grey levels. Decoders round differently, but tiles must look the same to a model."""
Decode = Callable[[list[bytes]], Tensor]


def run(rows: Rows, dry: bool) -> None:
    """Decode the same tiles with every installed decoder, and send the rates and differences."""
    n, side = (4, 32) if dry else (512, 224)
    tiles = [encode_tile(tile, "jpeg", 95) for tile in pictures(n, side)]
    want = libjpeg(tiles)
    where = {"size": f"{n} tiles of {side} px", "dtype": "uint8"}
    measure(rows, "libjpeg, one thread", libjpeg, tiles, want, where)
    for name, build in (("nvJPEG through torchvision", torchvision_decoder), ("DALI", dali_decoder)):
        try:
            decode = build(n, dry)
        except Exception as error:
            rows.fail("decode", error, provider=name, **where)
            continue
        if isinstance(decode, str):
            rows.skip("decode", decode, provider=name, **where)
            continue
        measure(rows, name, decode, tiles, want, where)


def pictures(n: int, side: int) -> list[np.ndarray]:
    """Return n smooth coloured images with noise, uint8 (side, side, 3)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    out = []
    for _ in range(n):
        kx, ky, phase = rng.uniform(1, 12, 3), rng.uniform(1, 12, 3), rng.uniform(0, 6, 3)
        wave = np.sin(kx * x[..., None] + ky * y[..., None] + phase)
        out.append(np.clip(150 + 80 * wave + rng.normal(scale=4, size=wave.shape), 0, 255).astype(np.uint8))
    return out


def libjpeg(tiles: list[bytes]) -> Tensor:
    """Return the tiles decoded by Pillow, uint8 (n, S, S, 3)."""
    import io

    from PIL import Image

    return torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in tiles]))


def torchvision_decoder(n: int, dry: bool) -> Decode | str:
    """Return a decoder by torchvision, on the GPU unless ``dry``, or the reason why it is not available."""
    if missing := why_not("torchvision.io"):
        return missing
    from torchvision.io import ImageReadMode, decode_jpeg

    device = "cpu" if dry else "cuda"

    def decode(tiles: list[bytes]) -> Tensor:
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in tiles]
        return torch.stack(decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)).permute(0, 2, 3, 1)

    return decode


def dali_decoder(n: int, dry: bool) -> Decode | str:
    """Return the decoder of the DALI loader for n tiles, or the reason why it is not available."""
    if missing := why_not("nvidia.dali"):
        return missing
    decoder = Decoder(n, 2 if dry else 8, None if dry else 0)

    def decode(tiles: list[bytes]) -> Tensor:
        decoder.start(tiles)
        out = torch.as_tensor(decoder.get()).clone()
        decoder.release()
        return out

    return decode


def measure(rows: Rows, name: str, decode: Decode, tiles: list[bytes], want: Tensor, where: dict[str, str]) -> None:
    """Send the rate of a decoder, and its difference from libjpeg."""
    try:
        difference = (decode(tiles).cpu().float() - want.float()).abs()
        seconds = [_seconds(decode, tiles) for _ in range(5)]
    except Exception as error:
        rows.fail("decode", error, provider=name, **where)
        return
    mean, most = float(difference.mean()), float(difference.max())
    status, note = ("ok" if mean <= LARGEST_MEAN else "failed"), f"largest {most:g}; bound of the mean {LARGEST_MEAN:g}"
    rows.add(Row("decode", "mean difference from libjpeg", mean, provider=name, status=status, note=note, **where))
    n, middle = len(tiles), statistics.median(seconds)
    rates = {"low": n / max(seconds), "high": n / min(seconds)}
    rows.add(Row("decode", "speed", n / middle, "tiles/s", provider=name, **rates, **where))  # type: ignore[arg-type]


def _seconds(decode: Decode, tiles: list[bytes]) -> float:
    began = time.perf_counter()
    decode(tiles)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
