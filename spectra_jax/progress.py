"""The progress line: one line that says how training goes, redrawn on a terminal and in a notebook, else repeated."""

import io
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any


def human(number: float | int) -> str:
    """A count in at most four characters and a unit: 950, 1.2k, 45.3M, 300B, 1.2T."""
    for unit in ("", "k", "M", "B"):
        if abs(number) < 999.5:
            digits = 1 if unit and abs(number) < 99.95 else 0
            return f"{number:.{digits}f}{unit}"
        number /= 1000
    return f"{number:.1f}T"


def duration(seconds: float | int) -> str:
    """Seconds for people: 12s, 3m12s, 1h04m, 2d03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


# Value -> (rank, text), in the order of the line. A terminal too narrow for all loses the highest
# ranks first; the step has rank 0.
FIELDS: Mapping[str, tuple[int, Callable[[float], str]]] = {
    "tokens": (5, lambda v: f"{human(v)} tok"),
    "loss": (1, lambda v: f"loss {v:.3f}"),
    "lr": (4, lambda v: f"lr {v:.2e}"),
    "weight_decay": (8, lambda v: f"wd {v:g}"),
    "tokens_per_second": (3, lambda v: f"{human(v)} tok/s"),
    "mfu": (6, lambda v: f"mfu {v:.1%}"),
    "stall": (9, lambda v: f"stall {v:.1%}"),
    "stall_max": (9, lambda v: f"worst {v:.1%}"),  # of all processes
    "eta": (2, lambda v: f"eta {duration(v)}"),
    "zeros": (7, lambda v: f"zeros {v:.1%}"),
    "flips": (7, lambda v: f"flips {v:.2%}"),
    "scale": (7, lambda v: f"scale {v:.4f}"),
}


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        """Forgets it."""
        return len(text)


class ProgressLine:
    """One line that says how training goes: redrawn in place on a terminal and in a notebook, else one per update."""

    def __init__(self, total_steps: int, stream: io.TextIOBase | None = None, *, enabled: bool = True):
        """`enabled`: False on every process but the first, where each call then does nothing."""
        self._total = total_steps
        self._stream = (stream or sys.stderr) if enabled else _Nowhere()
        notebook = stream is None and _in_notebook()  # there "\r" works as on a terminal
        self._live = enabled and (notebook or self._stream.isatty())
        self._shown = ""  # what stands on the terminal's current line

    def update(
        self,
        step: int,
        *,
        weights: Mapping[str, Mapping[str, Any]] | None = None,
        **values: Any,
    ) -> None:
        """Show the state after `step`.

        values: those named in FIELDS, absent or None ones left out; others are ignored, so the
        record that goes to `MetricsWriter.write` can be passed whole. mfu and stall are fractions.
        weights: matrix kind (q, up, ...) -> its "zeros" and "flips" (fractions) and "scale"; their
        plain averages over the kinds are shown.
        """
        for name in ("zeros", "flips", "scale"):
            found = [kind[name] for kind in (weights or {}).values() if kind.get(name) is not None]
            if found:
                values[name] = sum(found) / len(found)
        fields = [(0, f"step {step:>{len(f'{self._total:,}')},}/{self._total:,}")]
        for name, (rank, form) in FIELDS.items():
            if values.get(name) is not None:
                fields.append((rank, form(float(values[name]))))
        if self._live:
            self._draw(_fit(fields, self._width()))
        else:
            print("  ".join(text for _, text in fields), file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """Print `text` on lines of its own; on a terminal the progress line reappears below."""
        shown = self._shown
        self._draw("")
        print(text, file=self._stream, flush=True)
        self._draw(shown)

    def close(self) -> None:
        """End the redrawn line; a second call does nothing."""
        if self._shown:
            print(file=self._stream, flush=True)
            self._shown = ""

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self, text: str) -> None:
        """Replace the current line, blanking what a longer predecessor would leave behind."""
        if text or self._shown:
            blank = " " * (len(self._shown) - len(text))
            back = "\r" if not text else ""
            self._stream.write(f"\r{text}{blank}{back}")
            self._stream.flush()
            self._shown = text

    def _width(self) -> int:
        """Usable columns. The last stays free: some terminals wrap as soon as it is written."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            columns = 0
        return (columns or shutil.get_terminal_size().columns) - 1


def _in_notebook() -> bool:
    """Whether a kernel runs this code; that its library is loaded is not enough."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _fit(fields: list[tuple[int, str]], width: int) -> str:
    """Fields in their order, the highest ranks dropped until they fit; cut as a last resort."""
    while len(fields) > 1 and sum(len(text) + 2 for _, text in fields) - 2 > width:
        worst = max(range(len(fields)), key=lambda i: (fields[i][0], i))
        fields = fields[:worst] + fields[worst + 1 :]
    return "  ".join(text for _, text in fields)[:width]
