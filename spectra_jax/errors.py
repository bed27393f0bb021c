"""The exceptions that the command line turns into a message instead of a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What the user gave cannot work. The message carries the numbers, the rule and the fix."""


class Stopped(Exception):
    """A signal asked a run to stop; its state is saved, and the same command goes on from there."""


def one_of(value: str, allowed: Iterable[str], key: str) -> str:
    """`value`, if it is one of the names that `key` may take.

    Raises:
      UserError: it is not; the message lists the names, and the nearest of them.
    """
    allowed = list(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{key}={value!r} is not one of {', '.join(allowed)}{hint}")
    return value
