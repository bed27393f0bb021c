"""The trace of chosen steps, read with JAX's own reader of traces. In a whole run: test_loop.py."""

from pathlib import Path

import jax
import pytest
from jax.profiler import ProfileData

from spectra_jax.schema import Metrics
from spectra_jax.train.profile import Profile


def traced_steps(workdir: Path) -> list[list[int]]:
    """The numbers of the steps in each trace, in the order of their files."""
    found = []
    for path in sorted(workdir.glob("profile/plugins/profile/*/*.xplane.pb")):
        events = [
            event for plane in ProfileData.from_file(str(path)).planes for row in plane.lines for event in row.events
        ]
        found.append(sorted(dict(event.stats)["step_num"] for event in events if event.name == "train"))
    return found


@pytest.mark.parametrize(
    ("end", "traced"), [(9, [5, 6, 7]), (6, [5, 6]), (4, None)], ids=["whole", "ended inside", "before"]
)
def test_the_trace_holds_the_chosen_steps(tmp_path, end, traced):
    told, add = [], jax.jit(lambda x: x + 1)
    with Profile(Metrics(profile_at=5), tmp_path, lambda *_, **values: told.append((_, values))) as profile:
        for step in range(1, end + 1):
            profile.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                add(1.0).block_until_ready()
    assert traced_steps(tmp_path) == ([traced] if traced else [])
    assert told == ([((5, "profile"), {"folder": str(tmp_path / "profile")})] if traced else [])
    jax.profiler.start_trace(tmp_path / "other")  # fails where one is open
    jax.profiler.stop_trace()


def turns(profile: Profile, start: int, end: int) -> list[int]:
    """The steps before which the trace begins or ends in a run from `start` to `end`, as the loop asks for them."""
    found = []
    for step in range(start + 1, end + 1):
        if profile.due(step - 1):
            found.append(step)
        profile.before(step)
        assert not profile.due(step - 1)
    return found


@pytest.mark.parametrize(
    ("start", "end", "found", "events"),
    [
        (0, 20, [5, 8], [5]),
        (5, 20, [6, 8], [6]),  # resumed inside the window
        (6, 7, [7], [7]),
        (7, 20, [], []),
        (0, 4, [], []),
    ],
)
def test_where_a_run_that_begins_or_ends_elsewhere_traces(tmp_path, start, end, found, events):
    """Of a process that goes through the motions alone, as all but the first do."""
    told = []
    with Profile(Metrics(profile_at=5), tmp_path, lambda step, *_, **__: told.append(step), enabled=False) as profile:
        assert turns(profile, start, end) == found and told == events
    assert not list(tmp_path.iterdir())


def test_no_trace_by_default(tmp_path):
    with Profile(Metrics(), tmp_path, pytest.fail) as profile:
        assert turns(profile, 0, 9) == []
