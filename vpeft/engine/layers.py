"""Layers of settings, laid on each other: a file's bases, the file, a suite's recipe, the command line."""

import os
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError, did_you_mean
from .recipes import changed, expand
from .shipped import like, local_or_shipped

# What is exchanged by its name, and where its own options are, which mean nothing to another one.
OPTIONS_OF = {"method.name": "method.options", "optim.name": "optim.kwargs", "seg.head": "seg.options"}


def read_config(schema: type, file: str | Path, overrides: Sequence[str] = (), *, tell: bool = True) -> DictConfig:
    """A YAML file with its bases and overrides, laid over the defaults of a dataclass; only keys and types are checked.

    Args:
        schema: the dataclass.
        file, overrides, tell: as ``load_config``'s.

    Raises:
        ConfigError: as ``load_config``.
    """
    layers = _read(local_or_shipped(Path(file)), ())
    given = [setting(item) for item in overrides]
    config = OmegaConf.structured(schema)
    for layer in (*layers, *given):
        _at_home(layer)
    found = expand(layers, given, config.method.name) if any(f.name == "origin" for f in fields(schema)) else None
    if found is None:
        return _all_laid(config, layers, given)
    made = _all_laid(config, [*found.below, found.recipe], [])
    config = _all_laid(made, found.above, found.given)
    other = changed(made, config)
    config.origin = found.origin + (f"; other than there: {', '.join(other)}" if other else "")
    if tell and os.environ.get("RANK", "0") == "0":
        print(*found.dropped, config.origin, sep="\n", file=sys.stderr)
    return config


def setting(item: str, what: str = "override") -> DictConfig:
    """One ``key.sub=value``, as YAML has values.

    Args:
        item: as it was given.
        what: it is, at the beginning of an error.

    Raises:
        ConfigError: it is not of this form; names it.
    """
    if "=" not in item:
        raise ConfigError(f"{what} '{item}': expected key.sub=value")
    try:
        return OmegaConf.from_dotlist([item])
    except Exception as error:  # yaml's own errors have several unrelated classes
        raise ConfigError(f"{what} '{item}': {str(error).splitlines()[0]}") from error


def _at_home(node: Any) -> None:
    """Put the user's folder in the place of a leading ``~/``, which a shell leaves alone behind ``key=``."""
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if OmegaConf.is_config(node[key]):
            _at_home(node[key])
        elif isinstance(node[key], str) and node[key].startswith("~/"):
            node[key] = os.path.expanduser(node[key])


def _all_laid(config: DictConfig, files: list[DictConfig], given: list[DictConfig]) -> DictConfig:
    """The layers of files, then those of the command line, laid over what lies below."""
    for layer in files:
        config = _laid(config, layer, layer)
    for layer in given:  # on the command line, the name may stand behind its options
        config = _laid(config, layer, OmegaConf.merge(*given) if layer is given[0] else None)
    return config


def _laid(config: DictConfig, layer: DictConfig, names: DictConfig | None) -> DictConfig:
    """A layer laid over what lies below: the options of what it exchanges go, and an empty mapping empties one.

    Args:
        config: what lies below.
        layer: to be laid over it.
        names: where to look for names that exchange something.
    """
    for key, options in OPTIONS_OF.items():
        new = None if names is None else OmegaConf.select(names, key, throw_on_resolution_failure=False)
        old, dropped = OmegaConf.select(config, key), OmegaConf.select(config, options)
        if isinstance(new, str) and new != old and dropped:
            print(
                f"{key}={new}: the {options.rpartition('.')[2]} of {old} are dropped ({', '.join(dropped)})", file=sys.stderr
            )
            OmegaConf.update(config, options, {}, merge=False)
    for key in _empty(layer):
        node = OmegaConf.select(config, key, throw_on_missing=False)
        if OmegaConf.is_dict(node) and OmegaConf.get_type(node) is dict:
            OmegaConf.update(config, key, {}, merge=False)
    return merge(config, layer)


def _empty(layer: Any, path: str = "") -> Iterator[str]:
    """The keys of empty mappings."""
    for key in layer:
        if OmegaConf.is_interpolation(layer, key) or OmegaConf.is_missing(layer, key):
            continue
        where = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_dict(layer[key]):
            if not layer[key]:
                yield where
            yield from _empty(layer[key], where)


def merge(config: DictConfig, layer: DictConfig) -> DictConfig:
    """Lay untyped values over a typed configuration."""
    _check_keys(OmegaConf.get_type(config), layer, "")
    try:
        return OmegaConf.merge(config, layer)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error


def _read(file: Path, seen: tuple[Path, ...]) -> list[DictConfig]:
    """The file's bases, then the file."""
    if not file.is_file():
        near = [str(p) for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else like(file)
        raise ConfigError(f"configuration {file} does not exist{did_you_mean(str(file), near)}")
    file = file.resolve()
    if file in seen:
        raise ConfigError(f"{file}: its bases lead back to itself")
    try:
        layer = OmegaConf.load(file)
    except Exception as error:
        raise ConfigError(f"{file} is not readable YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{file}: expected a mapping of keys")
    bases = layer.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    return [x for b in bases for x in _read(file.parent / b, (*seen, file))] + [layer]


def _check_keys(schema: type, values: Any, path: str) -> None:
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path or 'configuration'}: expected a mapping of keys, got {values!r}")
    known = {f.name: f for f in fields(schema)}
    for key in values:
        where = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise ConfigError(f"{where}: unknown key{did_you_mean(key, known)}")
        if OmegaConf.is_interpolation(values, key) or OmegaConf.is_missing(values, key):
            continue  # known only when all layers lie on each other
        kind, value = known[key].type, values[key]
        if is_dataclass(kind) and value is not None:
            _check_keys(kind, value, where)
        elif typing.get_origin(kind) is list and is_dataclass(typing.get_args(kind)[0]) and OmegaConf.is_list(value):
            for number, item in enumerate(value):
                _check_keys(typing.get_args(kind)[0], item, f"{where}[{number}]")
