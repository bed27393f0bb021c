"""The largest arrays that a compiled program makes, each with the line of ours that it comes from."""

import re
from dataclasses import dataclass

from spectra_jax.plan import hlo

# Names for what others have made.
_NOTHING = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "constant"}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%[\w.\-]+ = (.*?) ([\w\-]+)\(")
_ROW = re.compile(r"^(\d+) (.*)$")


@dataclass(frozen=True)
class Array:
    """One kind of array; a program may make several of it, one after another."""

    bytes: int  # on a device
    shape: str  # as XLA writes it
    source: str  # FILE:LINE in the project, or the operation where XLA has kept no line


def largest(text: str, count: int) -> list[Array]:
    """The `count` largest of the text of a scheduled program, each size and line once; they need not live together."""
    lines, found = _Lines(text), set()
    fused = hlo.fused(text)
    for name, body in hlo.computations(text).items():
        for line in body if name not in fused else ():
            made = _INSTRUCTION.match(line)
            if made and made[2] not in _NOTHING and not made[2].endswith("-done"):
                found |= {Array(size, shape, lines.of(line)) for size, shape in hlo.arrays(made[1])}
    best: dict[tuple[str, str], Array] = {}
    for array in sorted(found, key=lambda array: (-array.bytes, array.shape, array.source)):
        best.setdefault((array.shape, array.source), array)
    return list(best.values())[:count]


class _Lines:
    """The tables of frames at the head of the text."""

    def __init__(self, text: str):
        self.files = self._table(text, "FileNames")
        self.locations = self._table(text, "FileLocations")
        self.frames = self._table(text, "StackFrames")

    @staticmethod
    def _table(text: str, name: str) -> dict[int, str]:
        rows = re.search(rf"^{name}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        return {int(row[1]): row[2] for line in rows[1].splitlines() if (row := _ROW.match(line))} if rows else {}

    def of(self, line: str) -> str:
        """The innermost line of the project that an instruction comes from."""
        frame = _field(line, "stack_frame_id")
        while frame in self.frames:
            place = self.locations[_field(self.frames[frame], "file_location_id")]
            file = self.files[_field(place, "file_name_id")].strip('"')
            inside = re.search(r"(?:spectra_jax|pallas_kernels)/[\w/]+\.py$", file)
            if inside and not file.endswith("/sharding.py"):  # which moves what others ask it to
                return f"{inside[0]}:{_field(place, 'line')}"
            frame = _field(self.frames[frame], "parent_frame_id") - 1  # counted from one here, 0 being none
        name = re.search(r'op_name="([^"]*)"', line)
        return name[1] if name else "the compiler"


def _field(text: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", text)
    return int(found[1]) if found else 0
