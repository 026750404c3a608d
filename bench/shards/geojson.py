"""Parse speed of a cell GeoJSON: our reader compared with ijson (``pip install ijson``).

    PYTHONPATH=.:data_shards python bench/shards/geojson.py --cells 60000

Both readers yield the features of one synthetic file of cell polygons; rounds alternate. The script prints CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from comtip_shards.sources.files.geojson import iter_features


def write_cells(path: Path, n: int) -> None:
    """Write a FeatureCollection of ``n`` polygons with 25 corners, as Space Ranger 4 does."""
    rng = np.random.default_rng(0)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [(rng.random((25, 2)) * 5e4).round(3).tolist()]},
            "properties": {"cell_id": i, "classification": {"name": "Cluster 1", "color": [1, 2, 3]}},
        }
        for i in range(n)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def cpu_seconds(read: Callable[[], Iterable[object]]) -> float:
    """Return the CPU seconds that reading all features takes."""
    began = time.process_time()
    for _ in read():
        pass
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=60_000, help="cells in the file (default 60000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median is printed (default 5)")
    args = parser.parse_args()
    import ijson

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.geojson"
        write_cells(path, args.cells)

        def with_ijson() -> Iterable[object]:
            with path.open("rb") as file:
                yield from ijson.items(file, "features.item", use_float=True)

        rounds = [(cpu_seconds(lambda: iter_features(path)), cpu_seconds(with_ijson)) for _ in range(args.rounds)]
        size = path.stat().st_size / 1e6
    ours, peer = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    print(f"{size:.0f} MB, {args.cells} cells: iter_features {ours:.2f} s, ijson ({ijson.backend}) {peer:.2f} s")
    print(f"ijson / iter_features, median of {args.rounds} rounds: {ratio:.2f}")


if __name__ == "__main__":
    main()
