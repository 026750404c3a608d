"""Reading and validation of the readout of an export (``readout.safetensors``)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from comtip_fast.export_checks import FIX, ExportError, few
from comtip_fast.models.comtip import CoMTIP
from comtip_fast.models.readout.features import N_VIEWS, ReadoutSettings, feature_width
from comtip_fast.models.readout.heads import FORMAT, NORMS, READABLE_VERSIONS
from comtip_fast.models.readout.section_statistics import ADJACENT

MOST_RADII, LARGEST_RADIUS = 4, 16.0
"""Bounds of the radii of a readout, which bound the number of neighbours that a prediction reads."""
MOST_KERNELS = 64
"""Largest number of kernels of a block: one per trained cohort of a species from which an adapted model was built."""


def read_readout(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the arrays and the header of ``readout.safetensors``.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ExportError
        The file is not valid, or has another format or version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = (header.get("format"), header.get("version"))
    except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{path}: not a valid readout ({error}); {FIX}") from error
    if found[0] != FORMAT:
        raise ExportError(f"{path}: not a readout: format {found[0]!r}, expected {FORMAT!r}; {FIX}")
    if found[1] not in READABLE_VERSIONS:
        raise ExportError(
            f"{path}: version {found[1]!r}; this comtip-fast reads versions {', '.join(map(str, READABLE_VERSIONS))}; use the release that "
            "wrote it"
        )
    return arrays, header


def check_readout(
    arrays: Mapping[str, np.ndarray],
    header: Mapping[str, Any],
    path: Path,
    trained: Sequence[str],
    *,
    model: CoMTIP,
    dim: int,
) -> None:
    """Check settings, genes, mixing weights, shapes, dtypes and values of a readout.

    Parameters
    ----------
    arrays, header
        From :func:`read_readout`.
    path
        File name for messages.
    trained
        Keys of the model's trained genes.
    model, dim
        The model of the export, and the width of its shared space.

    Raises
    ------
    ExportError
        The readout belongs to another model or is invalid; the message names the part.
    """
    settings = _readout_settings(header.get("settings"), path, dim, header.get("version"))
    n_features = feature_width(model, settings) * (1 + len(settings.radii))
    heads = header.get("heads")
    if not isinstance(heads, list) or not heads or not all(isinstance(h, dict) for h in heads):
        raise ExportError(f"{path}: the header has no list of heads; {FIX}")
    cohort, n_heads = Counter(str(h.get("cohort")) for h in heads).most_common(1)[0]
    if n_heads > 1:
        raise ExportError(f"{path}: the cohort {cohort!r} has {n_heads} heads, expected one per cohort; {FIX}")
    shapes: dict[str, tuple[int, ...]] = {}
    for number, head in enumerate(heads):
        blocks = settings.block_names(n_features)
        _check_head(head, f"{path}: head {number}", set(trained), blocks, header.get("version"))
        shapes |= {f"{number}.mean": (n_features,), f"{number}.std": (n_features,)}
        G = len(head["keys"])
        for block in blocks:
            M, of_kernels = _kernel_shapes(arrays, head, f"{number}.{block}", settings.columns(block, n_features).size)
            shapes |= of_kernels
            for prefix in (f"{number}.{block}.{norm}" for norm in NORMS):
                K = _columns(arrays, f"{prefix}.weight_FK")
                shapes |= {f"{prefix}.weight_FK": (M, K), f"{prefix}.loading_KG": (K, G)}
                shapes |= {f"{prefix}.mean_G": (G,), f"{prefix}.std_G": (G,)}
    if arrays.keys() != shapes.keys():
        odd = few(arrays.keys() ^ shapes.keys())
        raise ExportError(f"{path}: arrays missing or unknown: {odd}; {FIX}")
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise ExportError(f"{path}: {name} is {array.dtype} {array.shape}, expected float32 {shape}; {FIX}")
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise ExportError(f"{path}: {bad} of {array.size} values of {name} are not finite; {FIX}")
        if name.endswith((".std", ".std_G")) and (array < 0).any():
            raise ExportError(f"{path}: {name} has negative values; {FIX}")
        if name.endswith(".length_1") and (array <= 0).any():
            raise ExportError(f"{path}: {name} is {array[0]:g}, but the length of a kernel must be above 0; {FIX}")


def _columns(arrays: Mapping[str, np.ndarray], name: str) -> int:
    """Return the number of columns of an array, at least 1; 1 if there is no such array."""
    found = arrays.get(name, np.zeros((0, 0))).shape
    return max(1, found[-1]) if found else 1


def _kernel_shapes(
    arrays: Mapping[str, np.ndarray], head: Mapping[str, Any], prefix: str, n_features: int
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Return the number of mapped features of a block of ``n_features``, and the shapes of the arrays of its kernels."""
    stated = head.get("maps", {}).get(prefix.split(".")[1], {"kernels": 0, "linear": True})
    shapes: dict[str, tuple[int, ...]] = {}
    M = n_features if stated["linear"] else 0
    for kernel in (f"{prefix}.kernel{i}" for i in range(stated["kernels"])):
        P = _columns(arrays, f"{kernel}.basis_FP")
        landmarks = max(1, len(np.atleast_1d(arrays.get(f"{kernel}.landmark_MP", np.zeros(1)))))
        shapes |= {
            f"{kernel}.basis_FP": (n_features, P),
            f"{kernel}.landmark_MP": (landmarks, P),
            f"{kernel}.length_1": (1,),
        }
        M += landmarks
    return M, shapes


def _readout_settings(found: Any, path: Path, vector_dim: int, version: Any) -> ReadoutSettings:
    """Return the settings of the readout; raise ExportError if they are invalid or belong to another model."""
    wanted: dict[str, type] = {"views": int, "radii": list, "vector_dim": int, "stages": bool}
    if version == 1:
        wanted = {"views": int, "context": bool, "vector_dim": int}
    if not isinstance(found, dict) or {k: type(v) for k, v in found.items()} != wanted:
        names = ", ".join(f"{name} ({kind.__name__})" for name, kind in wanted.items())
        raise ExportError(f"{path}: settings are {found!r}, expected {names}; {FIX}")
    if not 1 <= found["views"] <= N_VIEWS or found["vector_dim"] != vector_dim:
        raise ExportError(
            f"{path}: views {found['views']} and vector_dim {found['vector_dim']}, expected 1 to {N_VIEWS} "
            f"views and vector_dim {vector_dim}; {FIX}"
        )
    radii = found.get("radii", [])
    known = len(radii) <= MOST_RADII and all(type(r) is float and r <= LARGEST_RADIUS for r in radii)
    if radii and not (known and radii[0] == ADJACENT and sorted(set(radii)) == radii):
        raise ExportError(
            f"{path}: radii are {radii!r}, expected none, or at most {MOST_RADII} that ascend from {ADJACENT:g} to at most "
            f"{LARGEST_RADIUS:g}; {FIX}"
        )
    return ReadoutSettings.of_header(found)


def _check_head(head: Mapping[str, Any], where: str, trained: set[str], blocks: Sequence[str], version: Any) -> None:
    """Raise ExportError if the header of one head is invalid."""
    keys = head.get("keys")
    if not isinstance(head.get("cohort"), str) or not isinstance(head.get("facts"), dict):
        raise ExportError(
            f"{where}: cohort is {head.get('cohort')!r}, expected text, and facts must be an object; {FIX}"
        )
    if not isinstance(keys, list) or not keys or not all(isinstance(k, str) for k in keys):
        raise ExportError(f"{where}: keys are not a list of genes; {FIX}")
    foreign = set(keys) - trained
    if foreign:
        raise ExportError(f"{where}: not trained genes of the model: {few(foreign)}; {FIX}")
    if len(set(keys)) < len(keys):
        raise ExportError(f"{where}: duplicate gene {Counter(keys).most_common(1)[0][0]}; {FIX}")
    if head.get("blocks") != list(blocks):
        raise ExportError(f"{where}: blocks are {head.get('blocks')!r}, expected {list(blocks)}; {FIX}")
    maps = head.get("maps", {})
    if not isinstance(maps, dict) or maps.keys() - set(blocks) or not all(_valid_map(m) for m in maps.values()):
        raise ExportError(
            f"{where}: maps are {maps!r}, expected, for blocks among {list(blocks)}, a number of kernels of at most {MOST_KERNELS} "
            f"and whether features are used (linear), at least one of them; {FIX}"
        )
    _check_mix(head.get("mix"), where, blocks, version)


def _check_mix(found: Any, where: str, blocks: Sequence[str], version: Any) -> None:
    """Raise ExportError if the weights of a head are invalid: of each normalisation or, before version 3, of both."""
    if version < 3:
        _check_weights(found, where, blocks)
        return
    if not isinstance(found, dict) or found.keys() != set(NORMS):
        raise ExportError(f"{where}: mix is {found!r}, expected weights for {' and '.join(NORMS)}; {FIX}")
    for norm in NORMS:
        _check_weights(found[norm], f"{where}, {norm}", blocks)
    if len({found[norm]["levels"] for norm in NORMS}) > 1:
        raise ExportError(
            f"{where}: mix is {found!r}, but the weight of levels must be the same for {' and '.join(NORMS)}; {FIX}"
        )


def _check_weights(mix: Any, where: str, blocks: Sequence[str]) -> None:
    """Raise ExportError unless there is a weight for each block and for levels, with a sum of 1."""
    if not isinstance(mix, dict) or mix.keys() != {*blocks, "levels"}:
        raise ExportError(f"{where}: mix is {mix!r}, expected a weight for {', '.join(blocks)} and levels; {FIX}")
    weights = list(mix.values())
    valid = all(type(w) in (int, float) and 0 <= w <= 1 for w in weights)
    if not valid or abs(sum(weights) - 1) > 1e-6 or mix["levels"] == 1:
        raise ExportError(f"{where}: weights {mix!r} must be 0 to 1 with a sum of 1, and not all on levels; {FIX}")


def _valid_map(found: Any) -> bool:
    """Return whether the header states a feature map: a number of kernels, and whether features are used."""
    if not isinstance(found, dict) or {k: type(v) for k, v in found.items()} != {"kernels": int, "linear": bool}:
        return False
    return 0 <= found["kernels"] <= MOST_KERNELS and (found["kernels"] > 0 or found["linear"])
