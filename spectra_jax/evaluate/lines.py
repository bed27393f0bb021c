"""The values of a question's line, checked: `where` (file and line) and `key` go into the message of the error."""

from collections.abc import Mapping
from typing import Any

from spectra_jax.errors import UserError


def text(value: Any, where: str, key: str) -> str:
    """A string. Raises UserError for anything else."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} holds a {type(value).__name__}, not a string")
    return value


def texts(value: Any, where: str, key: str) -> list[str]:
    """Two strings or more. Raises UserError for anything else."""
    if not isinstance(value, list) or len(value) < 2:
        count = f"{len(value)} of them" if isinstance(value, list) else f"a {type(value).__name__}"
        raise UserError(f"{where}: {key!r} holds {count}; a question needs a list of at least 2 strings")
    return [text(one, where, key) for one in value]


def filled(value: str, where: str, key: str) -> str:
    """A string that is not empty. Raises UserError for an empty one."""
    if not value:
        raise UserError(f"{where}: {key!r} holds an empty string, which has no likelihood; give it text")
    return value


def pairs(row: Mapping[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """The pairs of a line with "context" and "choices"."""
    context = text(row["context"], where, "context")
    return tuple((context, filled(choice, where, "choices")) for choice in texts(row["choices"], where, "choices"))


def index(value: Any, count: int, where: str, key: str) -> int:
    """The number of an answer. Raises UserError for anything else."""
    if type(value) is not int or not 0 <= value < count:
        raise UserError(f"{where}: {key}={value!r} is not one of the {count} answers; they count from 0 to {count - 1}")
    return value


def indices(value: Any, count: int, where: str, key: str) -> tuple[int, ...]:
    """Numbers of some of the answers, not of all. Raises UserError for anything else."""
    if not isinstance(value, list) or not 0 < len(value) < count:
        raise UserError(f"{where}: {key}={value!r} is no list of 1 to {count - 1} of the {count} answers")
    found = tuple(index(one, count, where, key) for one in value)
    if len(set(found)) < len(found):
        raise UserError(f"{where}: {key}={value!r} names an answer twice")
    return found
