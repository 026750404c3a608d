"""File search in Space Ranger folders, including prefixed names, flat folders, archives, and several sections per folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from comtip_shards.errors import SourceError
from comtip_shards.sources.files.names import by_section_id, safe_id
from comtip_shards.sources.files.packaging import by_prefix, contents, find, prefix_of, unpacked_tar
from comtip_shards.sources.tenx.matrix import TenxMatrix
from comtip_shards.sources.tenx.run import TAR, find_flat_mex, find_matrices, find_pictures, only, section_name

RENAMED_BINS = "bins of Visium HD; name the folder square_016um (or square_008um, square_002um), as Space Ranger does"

POSITIONS = r"tissue_positions(?:_list)?\.(?:csv|parquet)"
FACTORS = r"scalefactors_json\.json"
_FILTERED = ("filtered_feature_bc_matrix", "filtered_gene_bc_matrices")
_RAW = "raw_feature_bc_matrix"


@dataclass
class RunFiles:
    """Files of one section."""

    name: str
    """Section id."""
    root: Path
    """The searched folder."""
    prefix: str = ""
    """Prefix of the file names if the folder contains several sections."""
    positions: list[Path] = field(default_factory=list)
    """Tables of positions, sorted by name; the reader uses the first and checks that the others agree with it."""
    factors: Path | None = None
    pictures: dict[str, Path] = field(default_factory=dict)
    matrix: TenxMatrix | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Spatial:
    """Files in ``spatial/`` of one prefix; ``flat`` if they are in the searched folder itself."""

    positions: list[Path]
    factors: list[Path]
    pictures: dict[str, Path]
    flat: bool


def spatial_files(path: Path) -> list[str]:
    """Return the names of tables of positions, scale factors and archives of ``spatial/``, without reading any file."""
    names = []
    for folder, _ in _spatial_folders(path):
        for role in (POSITIONS, FACTORS):
            names += [p.name for files in by_prefix(folder, role).values() for p in files]
    return names + [p.name for files in by_prefix(path, "spatial" + TAR).values() for p in files]


def find_runs(path: Path) -> list[RunFiles]:
    """Return the sections of a folder, in order of their prefixes; raises SourceError if files cannot be assigned to them."""
    groups = _groups(path)
    matrices = _matrices(path)
    with_positions = {k: g for k, g in groups.items() if g.positions}
    if "" in with_positions and len(matrices) <= 1:
        with_positions = {"": with_positions[""]}
    if len(with_positions) <= 1:
        return [_single(path, groups, with_positions, matrices)]
    prefixes = by_section_id(sorted(with_positions), "prefixes", path)
    return [_one_of_many(path, prefix, groups[prefix], matrices) for prefix in prefixes.values()]


def _spatial_folders(path: Path) -> list[tuple[Path, str]]:
    """Return (folder, prefix of its name) of ``spatial``, ``ID_spatial`` and the folder itself."""
    found = [(p, prefix) for p in contents(path) if p.is_dir() and (prefix := prefix_of(p.name, "spatial")) is not None]
    return [*found, (path, "")]


def _groups(path: Path) -> dict[str, _Spatial]:
    folders = _spatial_folders(path)
    have = {prefix for folder, prefix in folders if folder != path}
    for prefix, files in by_prefix(path, "spatial" + TAR).items():
        if prefix not in have:
            members = unpacked_tar(files[0])
            inner = next(iter(find(members, "**/scalefactors_json.json")), members / "x").parent
            folders.insert(0, (inner, prefix))
    out: dict[str, _Spatial] = {}
    for folder, base in folders:
        positions, factors = by_prefix(folder, POSITIONS), by_prefix(folder, FACTORS)
        pictures = {p for role in ("hires", "lowres") for p in by_prefix(folder, rf"tissue_{role}_image\.\w+")}
        for prefix in {*positions, *factors, *pictures}:
            group = _Spatial(
                positions.get(prefix, []), factors.get(prefix, []), find_pictures(folder, prefix), folder == path
            )
            out.setdefault(base + prefix, group)
    return out


def _matrices(path: Path) -> dict[str, TenxMatrix]:
    """Return {prefix: matrix}; filtered matrices take precedence over raw ones."""
    out: dict[str, TenxMatrix] = {}
    for stem in (*_FILTERED, _RAW):
        for prefix, matrix in find_matrices(path, stem).items():
            out.setdefault(prefix, matrix)
    for prefix, matrix in find_flat_mex(path).items():
        out.setdefault(prefix, matrix)
    return out


def _single(
    path: Path, groups: dict[str, _Spatial], with_positions: dict[str, _Spatial], matrices: dict[str, TenxMatrix]
) -> RunFiles:
    """Return the only section of a folder; its files may have different prefixes."""
    prefix, group = next(iter(with_positions.items()), ("", None))
    factors = group.factors if group and group.factors else [f for g in groups.values() for f in g.factors]
    pictures = dict(group.pictures) if group else {}
    for other in groups.values():
        for which, picture in other.pictures.items():
            pictures.setdefault(which, picture)
    chosen = matrices.get(prefix) or matrices.get("")
    if chosen is None and matrices:
        only([m.path for m in matrices.values()], "count matrix")
        chosen = next(iter(matrices.values()))
    name = safe_id(prefix) if group is not None and group.flat and prefix else section_name(path)
    run = RunFiles(
        name, path, "", group.positions if group else [], only(factors, "scalefactors_json.json"), pictures, chosen
    )
    return _noted(run, bool(prefix))


def _one_of_many(path: Path, prefix: str, group: _Spatial, matrices: dict[str, TenxMatrix]) -> RunFiles:
    matrix = matrices.get(prefix)
    if matrix is None:
        key = prefix.strip("_-.")
        like = [
            p for p in matrices if p.strip("_-.") and (p.strip("_-.").endswith(key) or key.endswith(p.strip("_-.")))
        ]
        if len(like) > 1:
            raise SourceError(
                f"{path}: several count matrices for {key}: {', '.join(matrices[p].path.name for p in like)}; give the "
                "files of one section the same prefix"
            )
        matrix = matrices[like[0]] if like else None
    if matrix is None:
        have = ", ".join(m.path.name for m in matrices.values()) or "none"
        raise SourceError(
            f"{path}: no count matrix for {prefix.strip('_-.')} (found: {have}); give the files of one section the same prefix"
        )
    factors = only(group.factors, "scalefactors_json.json")
    return _noted(RunFiles(safe_id(prefix), path, prefix, group.positions, factors, group.pictures, matrix), True)


def _noted(run: RunFiles, prefixed: bool) -> RunFiles:
    """Add notes on the files that were combined, and on a raw matrix, and return ``run``."""
    if prefixed and run.matrix is not None and run.positions:
        used = [run.matrix.path, run.positions[0], *([run.factors] if run.factors else []), *run.pictures.values()]
        run.notes.append(f"files: {', '.join(p.name for p in used)}")
    if run.matrix is not None and any(_RAW in n for n in (run.matrix.path.name, run.matrix.path.parent.name)):
        run.notes.append(f"counts from {run.matrix.path.name} (no filtered matrix), restricted to spots in tissue")
    return run


def has_bins(spatial: Path) -> bool:
    """Return whether the scale factors in a folder ``spatial/`` describe bins of Visium HD."""
    factors = spatial / "scalefactors_json.json"
    if not factors.is_file():
        return False
    with factors.open("rb") as file:
        return b"bin_size_um" in file.read(1 << 16)
