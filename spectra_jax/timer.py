"""Where the wall time of a run goes, and the rates that follow from it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

PHASES = ("compile", "train", "stall", "eval", "checkpoint")


@dataclass(frozen=True)
class Interval:
    """Rates between two calls of `Timer.interval`."""

    tokens_per_second: float  # over training and stalls; compile, eval and checkpoint left out
    stall_share: float  # of that time, the part the device waited for data, 0 to 1


class Timer:
    """Splits wall time into PHASES and turns it into rates.

    Time belongs to "train" unless a `with timer.phase(...)` claims it; phases may nest, the inner
    one counts. `previous` is `seconds` of the run before it was stopped and resumed; names in it that
    are no phases ("start" and "lost" of train/goodput.py) are carried along.
    """

    def __init__(self, previous: Mapping[str, float] | None = None):
        self._seconds = dict.fromkeys(PHASES, 0.0) | dict(previous or {})
        self._phase = "train"
        self._mark = time.perf_counter()
        self._begin = dict(self._seconds)
        self._last = dict(self._seconds)
        self._steps = self._tokens = 0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, those before a resume included."""
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._mark
        self._mark = now
        return dict(self._seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the block to phase `name`."""
        if name not in PHASES:
            raise ValueError(f"phase {name!r} is not one of {PHASES}")
        outer, self._seconds, self._phase = self._phase, self.seconds, name
        try:
            yield
        finally:
            self._seconds, self._phase = self.seconds, outer

    def advance(self, *, steps: int, tokens: int) -> None:
        """Count work that is done."""
        self._steps += steps
        self._tokens += tokens

    def interval(self) -> Interval:
        """Rates since the last call (or the start), and begin the next interval."""
        now = self.seconds
        train, stall = (now[name] - self._last[name] for name in ("train", "stall"))
        tokens, self._tokens, self._last = self._tokens, 0, now
        busy = max(train + stall, 1e-9)
        return Interval(tokens / busy, stall / busy)

    def eta(self, remaining_steps: int) -> float | None:
        """Seconds to go at the pace since the start or resume, all phases but compile counted.

        None before the first step.
        """
        if self._steps == 0:
            return None
        now = self.seconds
        spent = sum(now[name] - self._begin[name] for name in PHASES if name != "compile")
        return spent / self._steps * remaining_steps
