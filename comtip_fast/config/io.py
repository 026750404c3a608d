"""Reading, validation and writing of config files: strict YAML; errors for unknown keys suggest a similar key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from comtip_fast.config.explain import all_keys, invalid_value, key_groups, not_json, unknown_key, yaml_problem
from comtip_fast.config.schema import CONFIG_VERSION, RunConfig
from comtip_fast.config.vision import VitConfig


class ConfigError(ValueError):
    """A config cannot be used. The message names the file or its other origin, the problem and the fix."""


MAX_BYTES = 1 << 20
"""Largest size of a config file."""
MAX_NODES = 100_000
"""Largest number of YAML nodes after expansion of aliases."""


class _Loader(yaml.SafeLoader):
    """YAML loader in which ``1e-3`` is a number, a date is text, and a duplicate key is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML reads this name)
        first: [(tag, regexp) for tag, regexp in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document; refuse aliases that expand to more than :data:`MAX_NODES` nodes."""
        node = super().get_single_node()
        if node is not None and _expanded_nodes(node, {}) > MAX_NODES:
            raise ConfigError(
                f"aliases (*name) expand to more than {MAX_NODES:,} values; write the values without aliases"
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping as a dict; raise for a duplicate key, of which PyYAML would keep the last value."""
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {name}", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _expanded_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of nodes after expansion of aliases; a node that contains itself exceeds the limit."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [n for c in children for n in (c if isinstance(c, tuple) else (c,))]
        known[id(node)] = 1 + sum(_expanded_nodes(n, known) for n in parts)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes text which :class:`_Loader` would read as a number."""


RENAMED = {"genes.per_task": "genes.per_cohort"}
"""Keys of earlier releases, which are still accepted in configs, checkpoints and exports."""
_ADAPTER = TypeAdapter(RunConfig)
_FLOAT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and apply overrides.

    Parameters
    ----------
    path
        A YAML file; None starts from the defaults.
    overrides
        Settings ``a.b=value`` with values in YAML, which take precedence over the file.

    Raises
    ------
    ConfigError
        The file is missing, too large or not YAML in UTF-8 with keys and values; an override is not ``key=value``; or there is an
        unsupported version, an unknown key, a wrong type, a value out of bounds or an invalid combination of values.
    """
    where = "defaults" if path is None else str(path)
    data: dict[str, Any] = {}
    if path is not None:
        data = _read_file(Path(path))
    for item in overrides:
        _override(data, item)
    if overrides:
        where = f"{where} with overrides {' '.join(overrides)}"
    return config_from_dict(data, where)


def _read_file(path: Path) -> dict[str, Any]:
    """Return the keys and values of a config file, which may be empty; raise ConfigError for other content."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise ConfigError(f"{path}: a folder or device, not a file; give a YAML file")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES >> 20} MiB, not a config; check the path")
    try:
        read = _parse(path.read_text(encoding="utf-8"), "correct this file")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if read is not None and not isinstance(read, dict):
        raise ConfigError(
            f"{path}: expected keys and values, found {type(read).__name__}; write lines such as `train: {{steps: 100}}`"
        )
    return _unshared(read or {})


def _parse(text: str, fix: str) -> Any:
    """Return a YAML document; raise ConfigError if it cannot be read; for invalid YAML, the message ends with ``fix``."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {yaml_problem(error)}; {fix}") from error
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError("lists or groups are nested too deeply; write the keys of docs/settings.md") from error
    except (ValueError, KeyError, AttributeError) as error:  # of PyYAML for a tag such as !!int with another value
        raise ConfigError(f"a tag (!!) does not fit its value ({error}); write values without tags") from error


def _unshared(data: dict[Any, Any]) -> dict[Any, Any]:
    """Return a copy in which no two keys share a dict, as YAML aliases do, so that an override changes one key only."""
    return {key: _unshared(value) if isinstance(value, dict) else value for key, value in data.items()}


def config_from_dict(data: Mapping[str, Any], where: str) -> RunConfig:
    """Build and validate a config from nested dicts.

    Parameters
    ----------
    data
        Values by key; missing keys take their defaults.
    where
        Origin of the values, for error messages.

    Raises
    ------
    ConfigError
        The version is not supported, or there is an unknown key, a wrong type, a value out of bounds or an invalid
        combination of values.
    """
    data = _with_current_names(_without_empty_groups(data))
    version = data.get("version", CONFIG_VERSION)
    if version != CONFIG_VERSION:
        raise ConfigError(
            f"{where}: config version {version!r}; this release reads version {CONFIG_VERSION} (a number); update the keys and "
            "the version, or use the release that wrote the config"
        )
    _refuse_unknown(data, RunConfig, "", where)
    config = _build(data, where)
    validate(config, where)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the config as nested dicts of JSON types."""
    return {key: _tuples_to_lists(value) for key, value in asdict(config).items()}


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML with all keys, from which :func:`load_config` reads an equal config."""
    return yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict with keys such as ``a.b``."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _override(data: dict[str, Any], item: str) -> None:
    """Set the value of an override ``a.b=value`` in nested dicts; raise ConfigError if that is not possible."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {item!r}: not of the form KEY=VALUE; write it as in train.steps=100")
    *path, last = key.strip().split(".")
    known = set(all_keys())
    for i, part in enumerate(path, start=1):
        group = ".".join(path[:i])
        if group in known:
            raise ConfigError(f"override {item!r}: {group} is a value, not a group of keys; write {group}=VALUE")
        if data.get(part) is None:
            data[part] = {}
        data, value = data[part], data[part]
        if not isinstance(data, dict):
            raise ConfigError(
                f"override {item!r}: {group} already has the value {value!r}, but must be a group of keys; remove this value"
            )
    try:
        data[last] = _parse(text, "correct it, or put text in YAML quotes, as in name='\"a: b\"'")
    except ConfigError as error:
        raise ConfigError(f"override {item[:80]!r}: {error}") from error


def _refuse_unknown(data: Mapping[str, Any], cls: type, prefix: str, where: str) -> None:
    """Raise ConfigError for a key that the group does not have, and for a group that is given a value."""
    groups = key_groups(cls)
    for key, value in data.items():
        if key not in groups:
            raise ConfigError(f"{where}: {unknown_key(str(key), prefix, groups, RENAMED)}")
        group = groups[key]
        if group is not None:
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{where}: {prefix}{key} is a group of keys ({', '.join(key_groups(group))}), not a value; set one of them"
                )
            _refuse_unknown(value, group, f"{prefix}{key}.", where)


def _without_empty_groups(data: Mapping[str, Any], cls: type = RunConfig) -> dict[str, Any]:
    """Return ``data`` without empty groups, which YAML reads as null, e.g. if all lines under ``optim:`` are comments."""
    groups = key_groups(cls)
    out = {}
    for key, value in data.items():
        group = groups.get(key)
        if group is None:
            out[key] = value
        elif value is not None:
            out[key] = _without_empty_groups(value, group) if isinstance(value, Mapping) else value
    return out


def _with_current_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``data`` with renamed keys; if both names are given, :func:`_refuse_unknown` rejects the old one."""
    out = {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
    for old, new in RENAMED.items():
        (group, old_key), (new_group, new_key) = old.split("."), new.split(".")
        section = out.get(group)
        if isinstance(section, dict) and old_key in section and new_key not in out.get(new_group, {}):
            value = section.pop(old_key)
            out.setdefault(new_group, {})[new_key] = value
    return out


def _tuples_to_lists(value: Any) -> Any:
    """Return nested dicts and tuples with lists instead of tuples."""
    if isinstance(value, dict):
        return {k: _tuples_to_lists(v) for k, v in value.items()}
    return [_tuples_to_lists(v) for v in value] if isinstance(value, tuple) else value


def validate(config: RunConfig, where: str = "config") -> None:
    """Check the bounds of every field and the combinations of fields.

    Raises
    ------
    ConfigError
        A value or a combination of values is invalid; the message names the key and what it must be.
    """
    _build(config_to_dict(config), where)
    for holds, message in (
        *_data_rules(config),
        *_model_rules(config),
        *_training_rules(config),
        *_engine_rules(config),
    ):
        if not holds:
            raise ConfigError(f"{where}: {message}")


def _build(data: Mapping[str, Any], where: str) -> RunConfig:
    """Return the config after a check of types and bounds; raise ConfigError for the first invalid value."""
    try:
        # Strict: "5" and true are not numbers. Passed as JSON, because strict Python input must be dataclass instances.
        return _ADAPTER.validate_json(json.dumps(data), strict=True)
    except TypeError:
        key, value = next(not_json(data))
        raise ConfigError(
            f"{where}: {key}: values of type {type(value).__name__} are not supported; use numbers, text, true, false, null and lists"
        ) from None
    except ValidationError as error:
        raise ConfigError(f"{where}: {invalid_value(error.errors())}") from None


Rule = tuple[bool, str]
"""Whether the config keeps a rule, and the message if it does not."""


def _data_rules(c: RunConfig) -> list[Rule]:
    d, slots = c.data, c.data.slots or 1
    return [
        (
            d.balance != "set" or not isinstance(d.shards, str),
            "data.balance: set; needs a list of several sets in data.shards, e.g. [hest, own]",
        ),
        (
            d.balance_temperature is None or d.balance != "none",
            f"data.balance_temperature: {d.balance_temperature}; needs data.balance set, organ or platform",
        ),
        (d.batch_size % slots == 0, f"data.batch_size: {d.batch_size}; must be a multiple of data.slots ({slots})"),
        (
            (d.sections_per_batch or 0) % slots == 0,
            f"data.sections_per_batch: {d.sections_per_batch}; must be null or a multiple of data.slots ({slots})",
        ),
    ]


def _model_rules(c: RunConfig) -> list[Rule]:
    v, t, genes = c.vision, c.text, c.genes
    return [
        (genes.held_out_every != 1, "genes.held_out_every: 1 would hold out every gene; use 0 or at least 2"),
        (
            genes.held_out_draw == "rank" or genes.held_out_every > 0,
            f"genes.held_out_draw: {genes.held_out_draw}; needs genes.held_out_every of at least 2, because 0 draws no gene",
        ),
        (
            c.panel.min_genes <= c.panel.max_genes,
            f"panel.max_genes: {c.panel.max_genes}; must not be below panel.min_genes ({c.panel.min_genes})",
        ),
        (
            v.backbone != "small" or v.width % v.heads == 0,
            f"vision.heads: {v.heads}; must divide vision.width ({v.width})",
        ),
        (
            v.backbone != "small" or v.vit == VitConfig(),
            (
                "vision.vit: applies to timm backbones only; with vision.backbone=small set vision.width, vision.depth, "
                "vision.heads and vision.patch_px instead"
            ),
        ),
        (t.width % t.heads == 0, f"text.heads: {t.heads}; must divide text.width ({t.width})"),
    ]


def _training_rules(c: RunConfig) -> list[Rule]:
    weights = (c.loss.nce, c.loss.mfm, c.loss.pair, c.loss.level)
    trace = c.watch.trace
    return [
        (
            any(weights),
            "loss: all weights are 0, so there is nothing to learn; set loss.nce, loss.mfm, loss.pair or loss.level above 0",
        ),
        (
            trace is None or 1 <= trace[0] <= trace[1],
            f"watch.trace: {trace}; give a first step from 1 and a last step that is not lower, e.g. [20, 25]",
        ),
    ]


def _engine_rules(c: RunConfig) -> list[Rule]:
    e = c.engine
    nvme = "nvme" in (e.offload_optimizer, e.offload_param)
    offloads = e.offload_optimizer != "none" or e.offload_param != "none"
    on_state, on_parameters = e.offload_optimizer, e.offload_param
    return [
        (
            not offloads or e.kind == "deepspeed",
            (
                f"engine.offload_optimizer={on_state}, engine.offload_param={on_parameters}: offloading needs "
                f"engine.kind=deepspeed, not {e.kind}; set both to none or change the engine"
            ),
        ),
        (
            on_state != "cpu" or e.zero_stage >= 1,
            f"engine.offload_optimizer=cpu: needs engine.zero_stage 1 to 3, not {e.zero_stage}",
        ),
        (
            on_parameters == "none" or e.zero_stage == 3,
            f"engine.offload_param={on_parameters}: needs engine.zero_stage=3, not {e.zero_stage}",
        ),
        (
            on_state != "nvme" or e.zero_stage == 3,
            (
                f"engine.offload_optimizer=nvme: needs engine.zero_stage=3, not {e.zero_stage}"
                f"{'; or set engine.offload_optimizer=cpu' if e.zero_stage else ''}"
            ),
        ),
        (
            c.train.checkpoint != "sharded" or (e.kind == "deepspeed" and e.zero_stage == 3 and not nvme),
            (
                "train.checkpoint=sharded: needs engine.kind=deepspeed with engine.zero_stage=3, without offloading to nvme; "
                "otherwise ranks hold no parts of the weights in memory; set train.checkpoint=auto"
            ),
        ),
        (
            not nvme or e.nvme_path != "",
            "engine.nvme_path: empty, but offloading to nvme needs a folder; set engine.nvme_path to a folder on a local NVMe drive",
        ),
    ]
