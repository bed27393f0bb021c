"""What a compiled program says to other devices: its collectives, read off the text of its HLO.

An instruction counts as often as it runs: those in the body of a loop as many times as the loop has turns. XLA writes
that beside the loop; in libtpu's programs it is the one whole number that the loop's condition compares with, over what
the body adds to its counter. (`cost_analysis` counts a body once, and Pallas kernels not at all.) libtpu writes a
reduce-scatter as an all-reduce and a slice, or as a ring of collective-permutes around the product.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
         "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_NUMBER = re.compile(r" = [su]\d+\[\]\S* constant\((\d+)\)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")


@dataclass(frozen=True)
class Collective:
    """One instruction. `bytes` are of its result on one device, `times` how often it runs in a step."""

    kind: str
    dtype: str
    bytes: int
    times: int
    started: bool  # asynchronously: other work may go on until it is done
    source: str  # the operation of the model that it comes from

    @property
    def total(self) -> int:
        """Bytes in a step."""
        return self.bytes * self.times


def collectives(text: str) -> list[Collective]:
    """All of a program. A loop that says nothing of its turns counts once."""
    times, found = _times(text), {}
    inside = fused(text)
    for name, body in computations(text).items():
        for line in body:
            if one := _collective(line, times.get(name, 0)):
                channel = _CHANNEL.search(line)
                # libtpu spreads one over several fusions, the beginning, the end and work in between, that share a
                # channel. (So do the copies of a loop that it unrolls, as on several slices: they count as one here.)
                key = (one.kind, channel[1]) if name in inside and channel else (name, line)
                found[key] = replace(one, started=True) if key in found else one
    return list(found.values())


def fused(text: str) -> set[str]:
    """Names of computations that are inside of fusions."""
    return set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", text))


def arrays(result: str) -> list[tuple[int, str]]:
    """Bytes and shape, as XLA writes it, of every array in the type of a result."""
    return [
        (BYTES[dtype] * prod(int(size) for size in dims.split(",") if size), f"{dtype}[{dims}]")
        for dtype, dims in _ARRAY.findall(result)
    ]


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a program."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            found[name] = []
        elif line == "}":  # kernels have lines of their own in here
            name = ""
        elif name:
            found[name].append(line)
    return found


def _times(text: str) -> dict[str, int]:
    """How often each computation runs."""
    bodies = computations(text)
    entry = next(head[2] for line in text.splitlines() if (head := _HEAD.match(line)) and head[1])
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, body in bodies.items():
        for line in body:
            calls[name] += _calls(line, bodies)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for called, turns in calls[name]:
            visit(called, count * turns)

    visit(entry, 1)
    return times


def _calls(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, with how often."""
    loop = _LOOP.search(line)
    turns = _turns(line, bodies[loop[1]], bodies[loop[2]]) if loop else 1
    for name in _CALLED.findall(line):
        yield name, turns
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield name.strip().lstrip("%"), 1


def _turns(line: str, condition: list[str], body: list[str]) -> int:
    """Of a loop; 1 if it does not say."""
    if known := _TURNS.search(line):
        return int(known[1])
    limits = _NUMBER.findall("\n".join(condition))
    counters = re.findall(r"get-tuple-element\(.*\), index=(\d+)", "\n".join(condition))
    if len(limits) != 1:
        return 1
    results = next((line for line in body if "ROOT" in line and " tuple(" in line), "")
    names = re.findall(r"%([\w.\-]+)", results[results.find(" tuple(") :])
    step = 1
    if len(counters) == 1 and int(counters[0]) < len(names):
        made = {found[1]: line for line in body if (found := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = ", line))}
        added = re.search(r" add\(%([\w.\-]+), %([\w.\-]+)\)", made.get(names[int(counters[0])], ""))
        steps = [int(n[1]) for name in added.groups() if (n := _NUMBER.search(made.get(name, "")))] if added else []
        step = steps[0] if steps else 1
    return -(-int(limits[0]) // step)


def _collective(line: str, times: int) -> Collective | None:
    found = _COLLECTIVE.search(line)
    if not found or not times:
        return None
    result, kind, start = found.groups()
    made = arrays(result)
    if start and kind != "all-reduce":  # a tuple of what goes in, what comes out, and marks
        made = [array for array in made if not array[1].endswith("[]")]
        made = made[len(made) // 2 :]
    dtype = made[0][1].partition("[")[0] if made else ""
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, dtype, sum(n for n, _ in made), times, bool(start), source[1] if source else "")


def by_kind(found: list[Collective]) -> dict[tuple[str, str], tuple[int, int]]:
    """Instructions run and bytes in a step, of each kind and dtype, the most bytes first."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for one in found:
        sums[one.kind, one.dtype][0] += one.times
        sums[one.kind, one.dtype][1] += one.total
    return {key: (n, size) for key, (n, size) in sorted(sums.items(), key=lambda item: -item[1][1])}
