"""Goodput: the share of a run's wall time that went into training steps which count.

The wall time of a run begins when its first process calls `train`. Every second of it has one name:

  start       a process opens the data and makes or restores the state;
  compile, stall (no batch was ready), eval (whatever looks at the run between two steps: evaluation, weights, traces),
  checkpoint  (as far as training waits for it) and train (all else): the phases of timer.py;
  lost        from the record that a process goes on from to the start of that process: the steps that are done again,
              with all that happened between them, and the time in which nothing ran.

Goodput is train over the sum of all. A record of kind "time" holds the sums; it is written when a process begins to
train, with every checkpoint, and at an orderly end. Those beyond the restored step go with all records beyond it, so
the newest one that stays belongs to the state that is restored, and whatever came after it is lost. The pause before
a finished run is trained for longer is no time of the run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from spectra_jax.progress import duration

PREFIX = "seconds/"  # as metrics.py flattens the names


@dataclass(frozen=True)
class Past:
    """What the earlier processes of a run have spent, and when this one began."""

    began: float  # Unix time
    seconds: dict[str, float] = field(default_factory=dict)
    restarts: int = 0
    redone: int = 0  # steps that had to be done again, as far as they were on record

    def at(self, now: float) -> dict[str, float]:
        """The sums when this process, at Unix time `now`, is ready to train."""
        start, lost = (self.seconds.get(name, 0.0) for name in ("start", "lost"))
        return {**self.seconds, "start": start + now - self.began, "lost": lost}


def past(records: Sequence[Mapping[str, Any]], step: int, began: float) -> Past:
    """What is behind a process that began at Unix time `began` and goes on after `step`.

    Args:
      records: metrics.jsonl as the process before left it, with what lies beyond `step`.
    """
    times = [record for record in records if record.get("kind") == "time"]
    kept = [record for record in times if record["step"] <= step]
    if not kept:
        return Past(began)
    last, newest = kept[-1], times[-1]
    seconds = {name.removeprefix(PREFIX): value for name, value in last.items() if name.startswith(PREFIX)}
    if last["step"] == last["steps"]:  # finished
        return Past(began, seconds, newest["restarts"], newest["redone"])
    seconds["lost"] += max(0.0, began - last["clock"])  # another host's clock may be behind
    done = max((record["step"] for record in records if record.get("kind") == "train"), default=0)
    return Past(began, seconds, newest["restarts"] + 1, newest["redone"] + max(0, done - step))


def time_record(past: Past, seconds: Mapping[str, float], now: float, steps: int) -> dict[str, Any]:
    """The record of kind "time" at Unix time `now`, in a run of `steps` steps; `seconds` are all sums so far."""
    return {
        "goodput": seconds["train"] / max(sum(seconds.values()), 1e-9),
        "restarts": past.restarts, "redone": past.redone, "steps": steps, "clock": now,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def line(record: Mapping[str, Any]) -> str:
    """A time record for people: where the wall time went."""
    seconds, n, redone = record["seconds"], record["restarts"], record["redone"]
    total = sum(seconds.values())
    names = {name: name for name in ("start", "compile", "stall", "eval", "checkpoint")}
    if n:
        steps = f" ({redone:,} step{'s' * (redone != 1)} redone)" if redone else ""
        names["lost"] = f"lost to {n:,} restart{'s' * (n != 1)}{steps}"
    shares = ", ".join(f"{text} {seconds[name] / max(total, 1e-9):.1%}" for name, text in names.items())
    return f"goodput {record['goodput']:.1%} of {duration(total)}: {shares}"


def worst_stall(stall: float, cast: Callable[[int], int]) -> dict[str, float | int]:
    """The largest stall share of all processes and whose it is, as entries of a record; none of a single process.

    It is that of the interval before, if there was one: the answer came while the steps of this one ran, so that no
    device waits for it.

    Args:
      stall: the share of this process, 0 to 1; rounded to 1/10000.
      cast: a vote that gives the highest number of all processes (distributed.py).
    """
    n = jax.process_count()
    if n == 1:
        return {}
    highest = cast((1 + round(stall * 10_000)) * n + jax.process_index())  # 0: nobody has voted
    share, process = divmod(highest, n)
    return {"stall_max": (share - 1) / 10_000, "stall_process": process} if highest else {}
