"""From config files and command-line overrides to the frozen `Config` of schema.py, once, at the edge.

A config file (`get_config(arg) -> ConfigDict`) starts from `default()` and changes values; `load` applies the
command line's `--config.a.b=value` overrides, refuses unknown keys with the nearest known one, checks every value
and returns a `Config`. No other module knows ml_collections.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import GenericAlias

import ml_collections

from spectra_jax import suite
from spectra_jax.checks import check
from spectra_jax.errors import UserError
from spectra_jax.schema import Config


def default() -> ml_collections.ConfigDict:
    """The schema with its defaults as a ConfigDict: where every config file starts.

    It takes any value: types are checked by `from_config_dict`, whose messages name the key.
    """
    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False)


def for_size(family: str, prefix: str, size: str) -> ml_collections.ConfigDict:
    """`default()` in the shape of one size of the suite, on the suite's SlimPajama mixture.

    Raises:
      UserError: the suite has no such size.
    """
    if size not in suite.SIZES:
        raise UserError(f"no size {size!r} in the suite; it has {', '.join(suite.SIZES)}")
    row = suite.SIZES[size]
    c = default()
    c.family = family
    c.name = f"{prefix}-{size}"
    c.model.update(V=row.V, D=row.D, F=row.F, L=row.L, N=row.N, K=row.N, H=row.H)
    c.data.sets = tuple(f"data/slimpajama/{name}={share}" for name, share in suite.SLIMPAJAMA.items())
    return c


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Reads `FILE.py[:ARG]`, applies overrides, checks everything.

    Args:
      spec: a config file with `get_config(arg)`, and its argument after a colon: `configs/trilm.py:99m`.
      overrides: texts such as `model.L=4` (what follows `--config.` on the command line).

    Raises:
      UserError: the file or a key is missing, or a value has the wrong type or breaks a rule.
    """
    config = from_config_dict(run_config_file(spec, "get_config"))
    return override(config, overrides)


def run_config_file(spec: str, function: str) -> typing.Any:
    """Calls `function` of the config file `FILE.py[:ARG]` with ARG, if there is one.

    Raises:
      UserError: no such file, no such function, or an ARG that the file refuses.
    """
    path_text, _, argument = spec.partition(":")
    path = Path(path_text)
    if not path.is_file():
        raise UserError(f"no config file {path_text!r}; the shipped ones are in configs/, e.g. configs/trilm.py:99m")
    module_spec = importlib.util.spec_from_file_location(f"spectra_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise UserError(f"{path_text} has no function {function}(arg); a config file must define it")
    return getattr(module, function)(*([argument] if argument else []))


def from_config_dict(values: ml_collections.ConfigDict) -> Config:
    """The frozen form of a ConfigDict; unknown keys are refused.

    Raises:
      UserError: an unknown key, a value of the wrong type, or a broken rule.
    """
    return check(_build(Config, values.to_dict(), ""))


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with values such as `model.L=4` changed, and checked again.

    Raises:
      UserError: an unknown key, an unreadable value, or a broken rule.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--config.{text} has no value; write --config.{text}=VALUE")
        config = _replace(config, key.split("."), value, key)
    return check(config)


def _build(cls: type, values: typing.Any, prefix: str):
    """A dataclass from a mapping, recursively."""
    if not isinstance(values, Mapping):
        raise UserError(f"config.{prefix.removesuffix('.')}={values!r} is a section, not a value; set keys in it")
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in types:
            raise _unknown_key(prefix + key)
    built = {}
    for key, value in values.items():
        kind = types[key]
        where = f"{prefix}{key}"
        built[key] = (
            _build(kind, value, where + ".") if dataclasses.is_dataclass(kind) else _coerce(value, kind, where)
        )
    return cls(**built)


def _replace(node, path: list[str], text: str, key: str):
    types = typing.get_type_hints(type(node))
    name, *rest = path
    if name not in types or bool(rest) != dataclasses.is_dataclass(types[name]):
        raise _unknown_key(key)
    if rest:
        return dataclasses.replace(node, **{name: _replace(getattr(node, name), rest, text, key)})
    return dataclasses.replace(node, **{name: _coerce(_parse(text, types[name]), types[name], key)})


def _parse(text: str, kind: type | GenericAlias) -> typing.Any:
    """The value that a command-line text stands for; what cannot be parsed stays text for `_coerce` to refuse."""
    if kind is str:
        return text
    if kind == tuple[str, ...]:
        return tuple(part for part in text.split(",") if part)
    try:
        return ast.literal_eval(text.strip().capitalize() if kind is bool else text.strip())
    except (ValueError, SyntaxError):
        return text


def _coerce(value: typing.Any, kind: type | GenericAlias, key: str) -> typing.Any:
    if kind == tuple[str, ...]:
        if isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
            return tuple(value)
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is float and isinstance(value, int | float):
        return float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # so that 3e9 tokens can be written as that
    elif isinstance(value, kind):
        return value
    name = getattr(kind, "__name__", str(kind))
    raise UserError(f"config.{key}={value!r} is not of type {name}")


def keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, e.g. `model.L`."""
    found = []
    for name, kind in typing.get_type_hints(cls).items():
        found += keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return found


def _unknown_key(key: str) -> UserError:
    known = keys()
    last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    near = (
        [k for k in known if k.lower() == key.lower()]
        or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        or [last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.5)]
    )
    hint = f"did you mean config.{near[0]}?" if near else f"the known sections are {', '.join(_sections())}"
    return UserError(f"unknown key config.{key}; {hint}")


def _sections() -> list[str]:
    return [name for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)]


def to_dict(config: Config) -> dict:
    """Plain, JSON-ready values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping) -> Config:
    """The inverse of `to_dict`: what a checkpoint or `config.json` holds.

    Raises:
      UserError: the values were written by another version and no longer fit the schema.
    """
    return check(_build(Config, values, ""))


def differences(old: Config, new: Config) -> list[str]:
    """Where two configs differ, as `model.L: 4 -> 8`."""
    a, b = _flat(to_dict(old)), _flat(to_dict(new))
    changed = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in changed]


def _flat(values: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
