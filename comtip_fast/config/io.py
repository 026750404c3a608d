"""Config files in and out: YAML to dataclasses, strictly, with the nearest key named where one is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from comtip_fast.config.schema import CONFIG_VERSION, RunConfig


class ConfigError(ValueError):
    """A config cannot be used; names the file, the key and the fix."""


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply overrides ``a.b=value`` (values are YAML); ``None`` starts from the defaults.

    Raises
    ------
    ConfigError
        Unknown key, wrong type, impossible combination or unreadable file.
    """
    where = "defaults" if path is None else str(path)
    data: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"{path}: no such file; configs/ holds examples")
        try:
            read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
        if read is not None and not isinstance(read, dict):
            raise ConfigError(f"{path}: expected keys and values, found {type(read).__name__}")
        data = read or {}
    for item in overrides:
        _override(data, item)
    return config_from_dict(data, where)


def config_from_dict(data: Mapping[str, Any], where: str) -> RunConfig:
    """Build a config from plain data; ``where`` names its origin in errors."""
    version = data.get("version", CONFIG_VERSION)
    if version != CONFIG_VERSION:
        raise ConfigError(f"{where}: config version {version!r}; this comtip-fast reads version {CONFIG_VERSION}")
    _refuse_unknown(data, RunConfig, "", where)
    try:
        config = TypeAdapter(RunConfig).validate_python(_lists_to_tuples(data))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        raise ConfigError(f"{where}: {key}: {first['msg']} (given: {first['input']!r})") from None
    _check(config, where)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain data (dicts, lists, numbers, strings)."""
    return _tuples_to_lists(asdict(config))  # type: ignore[no-any-return]


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML, every key named; :func:`load_config` reads the same config back."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a.b": value}`` of nested dicts."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _override(data: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {item!r}: write KEY=VALUE, e.g. train.steps=100")
    *path, last = key.strip().split(".")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {item!r}: {part} is a value, not a group of keys")
    data[last] = _scalar(text)


def _scalar(text: str) -> Any:
    """Read a value as YAML, and 1e-3 as the number that it is (YAML 1.1 wants 1.0e-3)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set: {text!r} is not a YAML value") from error
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _groups(cls: type) -> dict[str, type | None]:
    """Return the keys of a dataclass; the class of those that are groups."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] if is_dataclass(hints[f.name]) else None for f in fields(cls)}


def _refuse_unknown(data: Mapping[str, Any], cls: type, prefix: str, where: str) -> None:
    groups = _groups(cls)
    for key, value in data.items():
        if key not in groups:
            near = _nearest(str(key), groups, prefix)
            raise ConfigError(f"{where}: unknown key {prefix}{key}; did you mean {near}?")
        group = groups[key]
        if group is not None:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {prefix}{key} is a group of keys ({', '.join(_groups(group))})")
            _refuse_unknown(value, group, f"{prefix}{key}.", where)


def _nearest(key: str, groups: Mapping[str, Any], prefix: str) -> str:
    """Return the most similar key: of this group, else of the whole config."""
    here = difflib.get_close_matches(key, list(groups), n=1, cutoff=0.6)
    if here:
        return prefix + here[0]
    everywhere = list(flatten(asdict(RunConfig())))
    by_leaf = sorted(everywhere, key=lambda k: -difflib.SequenceMatcher(None, key, k.rsplit(".", 1)[-1]).ratio())
    return by_leaf[0]


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _lists_to_tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples_to_lists(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check(config: RunConfig, where: str) -> None:
    """Refuse combinations that no run could use."""
    c = config
    rules = [
        (c.data.batch_size >= 2, "data.batch_size: needs at least 2 spots, InfoNCE compares them"),
        (c.data.sections_per_batch is None or c.data.sections_per_batch >= 1, "data.sections_per_batch: 1 or more, or null"),
        (c.data.views >= 1, "data.views: at least 1"),
        (c.data.jitter >= 0, "data.jitter: not negative"),
        (0 <= c.genes.min_detection <= 1, "genes.min_detection: a share between 0 and 1"),
        (c.genes.per_task >= 0 and c.genes.held_out_every >= 0 and c.genes.held_out_from >= 0, "genes: counts cannot be negative"),
        (c.genes.held_out_every != 1, "genes.held_out_every: 1 would hold out every gene"),
        (1 <= c.panel.min_genes <= c.panel.max_genes, "panel: needs 1 <= min_genes <= max_genes"),
        (0 <= c.panel.variable_share <= 1, "panel.variable_share: a share between 0 and 1"),
        (3 <= c.levels.n_levels <= 256, "levels.n_levels: between 3 and 256 (levels are stored as one byte)"),
        (0 < c.vision.mask_ratio < 1, "vision.mask_ratio: between 0 and 1, both left out"),
        (c.vision.width % c.vision.heads == 0, "vision.heads: must divide vision.width"),
        (0 <= c.vision.ema_decay <= 1, "vision.ema_decay: between 0 and 1"),
        (c.text.width % c.text.heads == 0, "text.heads: must divide text.width"),
        (c.text.max_tokens >= 1 and c.text.depth >= 1 and c.vision.depth >= 1, "text and vision: sizes are at least 1"),
        (0 <= c.text.identity_drop <= 1, "text.identity_drop: a share between 0 and 1"),
        (c.align.dim >= 2 and c.align.temperature > 0 and c.align.max_scale > 0, "align: sizes and temperatures are positive"),
        (all(w >= 0 for w in (c.loss.nce, c.loss.mfm, c.loss.pair, c.loss.level)), "loss: weights are not negative"),
        (any(w > 0 for w in (c.loss.nce, c.loss.mfm, c.loss.pair, c.loss.level)), "loss: all weights are 0"),
        (c.loss.paat.candidates >= 1 and c.loss.paat.strata >= 1, "loss.paat: candidates and strata are at least 1"),
        (c.optim.lr > 0 and 0 <= c.optim.final_lr <= 1 and c.optim.clip >= 0, "optim: lr > 0, 0 <= final_lr <= 1, clip >= 0"),
        (0 <= c.optim.betas[0] < 1 and 0 <= c.optim.betas[1] < 1, "optim.betas: each in [0, 1)"),
        (c.train.steps >= 1 and c.train.log_every >= 1 and c.train.checkpoint_every >= 1, "train: counts are at least 1"),
        (c.train.keep_checkpoints >= 1, "train.keep_checkpoints: at least 1"),
        (c.train.validate_every >= 0 and c.train.patience >= 0 and c.train.threads >= 0, "train: counts are not negative"),
    ]  # fmt: skip
    for holds, message in rules:
        if not holds:
            raise ConfigError(f"{where}: {message}")
