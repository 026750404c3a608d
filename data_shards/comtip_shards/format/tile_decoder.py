"""Decoding of many tiles with Pillow, without a new image and without copies per tile."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, features

from comtip_shards.format import record
from comtip_shards.format.image_header import read_jpeg_header


class TileDecoder:
    """Decodes tiles, one at a time, to the same pixels as :func:`.record.decode_tile`.

    A JPEG of nothing but an image, as this package writes it, is decoded into an array of this object, whose pixels have four bytes
    as in Pillow's images. Opening it as a file would parse its header in Python, and an array of an image is a copy of a copy. All
    other tiles, also damaged ones, are decoded by :func:`.record.decode_tile`.

    Not for several threads at the same time.

    Parameters
    ----------
    px
        S, width and height of the tiles.
    codec
        ``jpeg``, ``png`` or ``webp``.
    """

    def __init__(self, px: int, codec: str) -> None:
        self._px, self._codec = px, codec
        self._pixels = np.empty((px, px, 4), np.uint8)
        # An image of this mode uses the memory of the array.
        self._image = Image.frombuffer("RGBX", (px, px), self._pixels, "raw", "RGBX", 0, 1)
        # libjpeg-turbo writes four bytes per pixel itself; otherwise Pillow adds the fourth one.
        self._layout = "RGBX" if features.check_feature("libjpeg_turbo") else "RGB"

    def decode(self, data: bytes, where: Callable[[], str]) -> np.ndarray:
        """Decode a tile without copying its pixels.

        Parameters
        ----------
        data
            The encoded tile.
        where
            Returns the name of the record for an error message.

        Returns
        -------
        np.ndarray
            uint8, contiguous (S, S, 3), or (S, S, 4) with a fourth channel without meaning; valid until the next call.

        Raises
        ------
        ShardError
            As for :func:`.record.decode_tile`.
        """
        return self._pixels if self._decode_jpeg(data) else self._decode_any(data, where)

    def decode_into(self, out_SS3: np.ndarray, data: bytes, where: Callable[[], str]) -> None:
        """Decode a tile into a contiguous uint8 array; for ``data``, ``where`` and errors see :meth:`decode`."""
        if self._decode_jpeg(data):
            # Pillow drops the fourth channel faster than NumPy.
            out_SS3.reshape(-1)[:] = np.frombuffer(self._image.tobytes("raw", "RGB"), np.uint8)
        else:
            out_SS3[...] = self._decode_any(data, where)

    def _decode_any(self, data: bytes, where: Callable[[], str]) -> np.ndarray:
        return record.decode_tile(data, self._px, self._codec, where())

    def _decode_jpeg(self, data: bytes) -> bool:
        """Decode a plain RGB JPEG of the expected size into the array; return whether that succeeded."""
        if self._codec != "jpeg":
            return False
        try:
            header = read_jpeg_header(data)
            size = (header.width, header.height, header.channels, header.bits)
            if not header.plain or size != (self._px, self._px, 3, 8):
                return False
            self._image.frombytes(data, "jpeg", self._layout, "")
        except (ValueError, IndexError, struct.error, OSError):
            return False
        return True
