"""Loaders of other projects: webdataset with Pillow, HEST-style h5 files with a ``DataLoader``, and DALI's reader.

The first two return the same as the loaders of comtip_fast: uint8 tiles with the same kinds of views (stain tables, rotations,
jitter) and the levels of a gene panel. Their views are drawn from one generator per worker, which is cheaper than keyed random
numbers. DALI's reader only decodes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comtip_shards import ShardSet
from comtip_shards.format import record
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from comtip_fast.config.schema import DataConfig
from comtip_fast.data.augment.views import ViewPlan, jitter_tables, make_views, stain_table
from comtip_fast.data.expression.training_tables import TrainingTables
from comtip_fast.data.loaders.process import without_collecting
from comtip_fast.data.records import EncodedSpots, SpotReader

_TURNS = (
    None,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
)
"""Pillow methods for the eight orientations of :func:`comtip_fast.data.augment.views.rotate_flip`."""


class TileViews:
    """Random views of tiles, one tile at a time.

    Parameters
    ----------
    shards, config
        Shard set with the stain of each section, and config with the strength of the jitter.
    how
        ``numpy`` (:func:`comtip_fast.data.augment.views.make_views`) or ``pillow`` (``transpose`` and ``point``), which is
        faster.
    """

    def __init__(self, shards: ShardSet, config: DataConfig, how: str) -> None:
        self.how, self.jitter = how, config.jitter
        self.stain = [stain_table(shards.stain(i)) for i in range(len(shards.manifest.sections))]
        self._rng = np.random.default_rng()

    def __call__(self, image: Image.Image | np.ndarray, section: int) -> np.ndarray:
        """Return a random view, uint8 (3, S, S)."""
        jitter = jitter_tables(self._rng.random((1, 6)), self.jitter)[0]
        table = np.stack([jitter[c][self.stain[section][c]] for c in range(3)])
        return self.view(image, int(self._rng.integers(8)), table)

    def view(self, image: Image.Image | np.ndarray, turn: int, table_3V: np.ndarray) -> np.ndarray:
        """Return the tile in orientation ``turn`` with its values mapped by ``table_3V``: uint8 (3, S, S)."""
        if self.how == "numpy":
            plan = ViewPlan(np.zeros(1, np.int64), np.array([turn]), table_3V[None])
            return np.ascontiguousarray(make_views(np.asarray(image)[None], plan)[0].transpose(2, 0, 1))
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        method = _TURNS[turn]
        picture = picture if method is None else picture.transpose(method)
        return np.ascontiguousarray(np.asarray(picture.point(table_3V.ravel().tolist())).transpose(2, 0, 1))


def webdataset_batches(
    shards: ShardSet, tables: TrainingTables, panel: np.ndarray, config: DataConfig, views: str
) -> Generator[int, None, None]:
    """Read shuffled tars with ``webdataset``, decode with Pillow in worker processes, and yield batch sizes endlessly."""
    import webdataset

    train = {s.section_id for s in shards.manifest.sections if s.split == "train"}
    urls = [str(shards.path / s.file) for s in shards.manifest.shards if s.section_id in train]
    decode = _DecodeRecord(shards, tables, panel, TileViews(shards, config, views))
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .repeat()
        .shuffle(512)
        .map(decode)
        .batched(config.batch_size, collation_fn=_collate)
    )
    loader = DataLoader(pipeline, batch_size=None, num_workers=config.workers, prefetch_factor=2)
    with without_collecting():
        batches = iter(loader)
    for tiles, _, _ in batches:
        yield len(tiles)


class _DecodeRecord:
    """Converts a WebDataset sample to (tile, levels, section)."""

    def __init__(self, shards: ShardSet, tables: TrainingTables, panel: np.ndarray, views: TileViews) -> None:
        self.shards, self.tables, self.panel, self.views = shards, tables, panel, views
        self.number = {s.section_id: i for i, s in enumerate(shards.manifest.sections)}

    def __call__(self, sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
        section = self.number[record.decode_json(sample["json"], sample["__key__"])["section_id"]]
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            tile = self.views(image.convert("RGB"), section)
        rows, counts = record.decode_expr(sample["expr"], self.tables.n_genes, sample["__key__"])
        values = np.zeros(self.tables.n_genes, np.float32)
        values[rows] = np.log1p(counts * np.float32(1e4 / max(1, counts.sum())))
        values = values[self.tables.genes.trained[self.panel]]
        return tile, self.tables.table.levels(values[None], self.panel)[0], section


def _collate(samples: list[tuple[np.ndarray, np.ndarray, int]]) -> tuple[Tensor, Tensor, Tensor]:
    tiles, levels, section = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(tiles)), torch.from_numpy(np.stack(levels)), torch.tensor(section)


def write_h5(shards: ShardSet, folder: Path) -> None:
    """Write an h5 file per training section in the layout of HEST: uncompressed ``img`` (N, S, S, 3), one tile per chunk."""
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    for number, section in enumerate(shards.manifest.sections):
        path = folder / f"{section.section_id}.h5"
        if section.split != "train" or path.is_file():
            continue
        spots, px = shards.select(sections=[number]), shards.manifest.tile.px
        tmp_path = path.with_suffix(".writing")
        with h5py.File(tmp_path, "w") as file:
            img = file.create_dataset("img", (spots.size, px, px, 3), np.uint8, chunks=(1, px, px, 3))
            for start in range(0, spots.size, 128):
                img[start : start + 128] = shards.tiles(spots[start : start + 128])
            file["barcode"] = spots
        tmp_path.rename(path)


class H5Tiles(Dataset):
    """Dataset of spots with tiles from h5 files and levels from memory, where such trainers usually keep expression.

    ``bytes_per_s`` limits the read rate of each worker; 0 means no limit.
    """

    def __init__(
        self, folder: Path, shards: ShardSet, levels: np.ndarray, views: TileViews, bytes_per_s: float
    ) -> None:
        self.folder, self.levels, self.views, self.bytes_per_s = folder, levels, views, bytes_per_s
        train = [(i, s) for i, s in enumerate(shards.manifest.sections) if s.split == "train"]
        self.rows = [(s.section_id, i, row) for i, s in train for row in range(s.n_spots)]
        self._files: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray, int]:
        import h5py

        began = time.perf_counter()
        name, section, row = self.rows[item]
        if name not in self._files:
            self._files[name] = h5py.File(self.folder / f"{name}.h5")["img"]
        tile = self._files[name][row]
        if self.bytes_per_s:
            time.sleep(max(0.0, tile.nbytes / self.bytes_per_s - (time.perf_counter() - began)))
        return self.views(tile, section), self.levels[item], section


def h5_batches(
    folder: Path,
    shards: ShardSet,
    tables: TrainingTables,
    panel: np.ndarray,
    config: DataConfig,
    views: str,
    bytes_per_s: float = 0.0,
) -> Generator[int, None, None]:
    """Read h5 tiles in random order with a ``DataLoader`` and yield batch sizes endlessly."""
    assert tables.levels is not None
    rate = bytes_per_s / config.workers
    data = H5Tiles(folder, shards, tables.levels[:, panel], TileViews(shards, config, views), rate)
    while True:
        loader = DataLoader(
            data,
            config.batch_size,
            sampler=RandomSampler(data, num_samples=1 << 20),
            num_workers=config.workers,
            collate_fn=_collate,
            prefetch_factor=2,
        )
        with without_collecting():
            batches = iter(loader)
        for tiles, _, _ in batches:
            yield len(tiles)


def dali_reader_batches(shards: ShardSet, config: DataConfig) -> Generator[int, None, None]:
    """Read and decode with ``fn.readers.webdataset`` and the set's indexes, and yield batch sizes endlessly.

    The order is that of DALI; there are no views, levels or exact resumption.
    """
    from importlib import import_module

    dali: Any = import_module("nvidia.dali")
    train = {s.section_id for s in shards.manifest.sections if s.split == "train"}
    own = [s for s in shards.manifest.shards if s.section_id in train]

    @dali.pipeline_def(batch_size=config.batch_size, num_threads=config.workers, device_id=None)
    def pipeline() -> Any:
        jpeg, expr = dali.fn.readers.webdataset(
            paths=[str(shards.path / s.file) for s in own],
            index_paths=[str(shards.path / s.index) for s in own],
            ext=["jpg", "expr"],
            random_shuffle=True,
            initial_fill=512,
            missing_component_behavior="error",
        )
        return dali.fn.decoders.image(jpeg, device="cpu", output_type=dali.types.RGB), expr

    pipe = pipeline()
    pipe.build()
    while True:
        tiles, _ = pipe.run()
        yield len(tiles)


def limit_rate(records: SpotReader, bytes_per_s: float) -> None:
    """Limit a reader in place to a storage rate in bytes/s."""
    fetch: Callable[[np.ndarray], EncodedSpots] = records.fetch

    def slow(spots: np.ndarray) -> EncodedSpots:
        began = time.perf_counter()
        got = fetch(spots)
        size = sum(map(len, got.tiles)) + sum(map(len, got.exprs))
        time.sleep(max(0.0, size / bytes_per_s - (time.perf_counter() - began)))
        return got

    records.fetch = slow  # type: ignore[method-assign]
