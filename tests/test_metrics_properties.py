"""metrics.jsonl after any crash and any resume: whole records, in order, as if nothing had happened."""

import json
import math
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectra_jax.metrics import FILE, KINDS, MetricsWriter, read

# The same examples in every run, and none refused because the machine is slow.
repeatable = partial(settings, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

LOST = object()  # stands for what JSON has no word for
NAMES = st.text(st.characters(exclude_characters="/", codec="utf-8"), max_size=5)
PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
# By name, what is handed over and what must come back.
VALUES = st.dictionaries(NAMES.filter(lambda name: name not in ("step", "kind", "nonfinite")), st.one_of(
    PLAIN.map(lambda value: (value, value)),
    st.tuples(FLOATS, st.sampled_from((float, np.float32, np.asarray))).map(lambda pair: (pair[1](pair[0]), pair[0])),
    st.integers(-(2**63), 2**63 - 1).map(lambda value: (np.int64(value), value)),
    st.sampled_from((math.nan, math.inf, np.float32("-inf"), np.asarray(math.nan))).map(lambda value: (value, LOST)),
), max_size=4)
# The kinds of record that steps 1, 2, ... write, at most one of each, as a run does; some steps write none.
PLANS = st.lists(st.lists(st.sampled_from(KINDS), unique=True), min_size=1, max_size=8)


def write(writer: MetricsWriter, plan: list[list[str]], start: int = 0, stop: int | None = None) -> None:
    """Steps start + 1 .. stop of the run; what they record depends on the step alone."""
    for step, kinds in list(enumerate(plan, 1))[start:stop]:
        for kind in kinds:
            values = {"loss": 1 / step, "text": '}"\n{é' * step, "norm": math.inf if step % 3 else 0.5}
            writer.write(step, kind, {"of": values})


def uninterrupted(plan: list[list[str]]) -> tuple[bytes, list[int]]:
    """The file of a run that nothing stops, and its length after 0, 1, ... steps."""
    with tempfile.TemporaryDirectory() as folder:
        lengths = [0]
        with MetricsWriter(folder) as writer:
            for step in range(len(plan)):
                write(writer, plan, step, step + 1)
                lengths.append((Path(folder) / FILE).stat().st_size)
        return (Path(folder) / FILE).read_bytes(), lengths


def whole_lines(content: bytes, cut: int) -> list[bytes]:
    """The lines whose last brace lies before the cut; the newline after it may be lost."""
    lines = content.splitlines(keepends=True)
    return [line for n, line in enumerate(lines) if len(b"".join(lines[: n + 1])) - 1 <= cut]


def cuts(content: bytes) -> st.SearchStrategy[int]:
    """Any byte, and often one beside a newline, where a record is whole and its line is not."""
    ends = [at for at, byte in enumerate(content) if byte == ord("\n")]
    return st.integers(0, len(content)) | st.sampled_from([0, *ends, *(end + 1 for end in ends)])


@repeatable(max_examples=120)
@given(st.lists(st.tuples(st.integers(), st.sampled_from(KINDS), VALUES, VALUES, VALUES), max_size=3))
def test_records_survive_the_round_trip(records):
    expected = []
    with tempfile.TemporaryDirectory() as folder:
        with MetricsWriter(folder) as writer:
            for step, kind, *groups in records:
                top, inner, innermost = ({name: given for name, (given, _) in group.items()} for group in groups)
                writer.write(step, kind, {**top, "a/b": inner, "a/c": {"d": innermost}})
                flat = {
                    prefix + name: back for prefix, group in zip(("", "a/b/", "a/c/d/"), groups)
                    for name, (_, back) in group.items()
                }
                lost = [name for name, back in flat.items() if back is LOST]
                record = {"step": step, "kind": kind} | flat | dict.fromkeys(lost)
                expected.append(record | {"nonfinite": lost} if lost else record)
        # As text, because 1 == True == 1.0 and 0.0 == -0.0.
        assert json.dumps(read(folder), sort_keys=True) == json.dumps(expected, sort_keys=True)


@repeatable(max_examples=20)
@given(PLANS)
def test_a_file_cut_at_any_byte_is_read_up_to_its_last_whole_record(plan):
    content, _ = uninterrupted(plan)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(content)
        for cut in reversed(range(len(content) + 1)):
            os.truncate(Path(folder) / FILE, cut)
            assert read(folder) == [json.loads(line) for line in whole_lines(content, cut)]


@repeatable(max_examples=150)
@given(PLANS, st.data())
def test_resuming_keeps_the_whole_records_up_to_its_step_and_goes_on_behind_them(plan, data):
    content, _ = uninterrupted(plan)
    cut = data.draw(cuts(content), label="cut")
    resume = data.draw(st.integers(-1, len(plan) + 1), label="resume_step")
    kept = [line for line in whole_lines(content, cut) if json.loads(line)["step"] <= resume]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(content[:cut])
        with MetricsWriter(folder, resume_step=resume) as writer:
            assert (Path(folder) / FILE).read_bytes() == b"".join(kept)
            write(writer, plan, max(resume, 0))
        found = [(record["step"], record["kind"]) for record in read(folder)]
    assert len(set(found)) == len(found) and found == sorted(found, key=lambda one: one[0])


@repeatable(max_examples=150)
@given(PLANS, st.data())
def test_a_run_that_crashes_again_and_again_leaves_the_file_of_one_that_never_did(plan, data):
    content, lengths = uninterrupted(plan)
    start = 0  # steps that are done, by the newest checkpoint
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        for stop in data.draw(st.lists(st.integers(1, len(plan)), max_size=5), label="crashes after steps"):
            with MetricsWriter(folder, resume_step=start or -1) as writer:
                write(writer, plan, start, stop)
                cut = data.draw(cuts(path.read_bytes()), label="cut")
                os.truncate(path, cut)
            assert content.startswith(path.read_bytes())
            # A checkpoint is committed when the records of its step are on the disk, so none is newer than this.
            safe = max(step for step, length in enumerate(lengths) if length - 1 <= cut)
            start = data.draw(st.integers(0, safe), label="resumed from step")
        with MetricsWriter(folder, resume_step=start or -1) as writer:
            write(writer, plan, start)
        assert path.read_bytes() == content
