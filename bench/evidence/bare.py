"""Replacements for missing packages, for a machine with only PyTorch, Triton, timm, tokenizers and NumPy.

pydantic is replaced by the subset that reading a config needs. Packages for shards and reports are replaced by modules that can
be imported but not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.machinery
import json
import sys
import types
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

UNUSED = ("pandas", "pyarrow", "pyarrow.parquet", "scipy", "scipy.sparse", "scipy.spatial")
"""Modules that this project imports, but that the parts do not use."""


class ValidationError(ValueError):
    """Stand-in for pydantic's exception; the replacement never raises it."""


class TypeAdapter:
    """Builds dataclasses from JSON; types and bounds are not checked, because the shipped configs are known to be valid."""

    def __init__(self, target: Any, **_options: Any) -> None:
        self.target = target

    def validate_json(self, text: str | bytes, **_options: Any) -> Any:
        """Return an instance of ``target`` built from JSON."""
        return build(self.target, json.loads(text))

    def validate_python(self, value: Any, **_options: Any) -> Any:
        """Return an instance of ``target`` built from plain values."""
        return build(self.target, value)


def build(target: Any, value: Any) -> Any:
    """Convert ``value`` to ``target``: dicts to dataclasses, without unknown keys, and lists to tuples; others are unchanged."""
    while get_origin(target) is Annotated:
        target = get_args(target)[0]
    if dataclasses.is_dataclass(target) and isinstance(value, dict):
        hints = get_type_hints(target, include_extras=True)
        return target(**{key: build(hints[key], item) for key, item in value.items() if key in hints})  # type: ignore[operator]
    if isinstance(value, list) and _is_tuple(target):
        return tuple(value)
    return value


def _is_tuple(target: Any) -> bool:
    if get_origin(target) in (Union, types.UnionType):
        return any(_is_tuple(part) for part in get_args(target))
    return get_origin(target) is tuple


def _marker(*_arguments: Any, **_options: Any) -> Any:
    return None


def replace_pydantic() -> bool:
    """Register the replacement if pydantic cannot be imported; return whether it is in use."""
    try:
        module = importlib.import_module("pydantic")
    except ImportError:
        module = sys.modules["pydantic"] = replacement()
        fields = types.ModuleType("pydantic.fields")
        fields.FieldInfo = type("FieldInfo", (), {})  # type: ignore[attr-defined]
        sys.modules["pydantic.fields"] = fields
    return hasattr(module, "REPLACEMENT")


def replacement() -> types.ModuleType:
    """Return a module with the names that this project imports from pydantic."""
    module = types.ModuleType("pydantic")
    names = {
        "REPLACEMENT": True,
        "TypeAdapter": TypeAdapter,
        "ValidationError": ValidationError,
        "ConfigDict": dict,
        "with_config": lambda *_a, **_k: lambda cls: cls,
        **dict.fromkeys(("Field", "AfterValidator", "BeforeValidator"), _marker),
    }
    for name, value in names.items():
        setattr(module, name, value)
    module.__path__ = []
    return module


class Unused:
    """Result of any call to a module that is not installed; reading a public attribute raises ``ModuleNotFoundError``."""

    def __init__(self, package: str) -> None:
        self._package = package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        package = self._package
        raise ModuleNotFoundError(f"{package} is not installed; install it to run this part", name=package)


class UnusedModule(types.ModuleType):
    """Replacement for a module that is not installed: any name exists, and calling it returns an :class:`Unused`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # PyTorch looks up the specs of some packages, which must not be None.
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        package = self.__name__.partition(".")[0]

        def result(*_arguments: Any, **_options: Any) -> Any:
            return Unused(package)

        return type(name, (), {"__new__": result})  # a class, which type annotations accept


def replace_unused() -> list[str]:
    """Register a replacement for every missing module of :data:`UNUSED`, and return their names."""
    missing = []
    for name in UNUSED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            if not isinstance(sys.modules[name], UnusedModule):
                continue
        module = sys.modules[name] = UnusedModule(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        missing.append(name)
    return missing
