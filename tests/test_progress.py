"""The progress line, on a real pseudo-terminal and in a file."""

import fcntl
import io
import math
import os
import re
import struct
import termios

import pytest

from spectra_jax.progress import ProgressLine, duration, human

RECORD = {
    "tokens": 1_228_800, "loss": 3.21449, "lr": 1.2e-3, "weight_decay": 0.1, "grad_norm": 0.7,
    "tokens_per_second": 45_230.0, "mfu": 0.431, "stall": 0.001, "eta": 192.4,
}
WEIGHTS = {
    "q": {"zeros": 0.25, "flips": 0.001, "scale": 0.02},
    "up": {"zeros": 0.35, "flips": 0.003, "scale": 0.03},
}
LINE = (
    "step    300/10,000  1.2M tok  loss 3.214  lr 1.20e-03  wd 0.1  45.2k tok/s  mfu 43.1%  "
    "stall 0.1%  eta 3m12s"
)


def test_in_a_file_every_update_is_a_line():
    stream = io.StringIO()
    with ProgressLine(10_000, stream) as progress:
        progress.update(300, **RECORD)
        progress.message("checkpoint saved")
        progress.update(300, **RECORD, weights=WEIGHTS)
        progress.update(301, loss=math.nan, mfu=None, weights={"q": {"scale": 0.5, "flips": None}})
    assert stream.getvalue().splitlines() == [
        LINE,
        "checkpoint saved",
        LINE + "  zeros 30.0%  flips 0.20%  scale 0.0250",
        "step    301/10,000  loss nan  scale 0.5000",
    ]


class _Terminal:
    """A real pseudo-terminal, and what a person would see on it."""

    def __init__(self, columns: int):
        self.columns = columns
        self._reader, writer = os.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(writer, "w")

    def screen(self) -> list[str]:
        """Rows after all output: printed text overwrites, carriage return goes back, rows wrap."""
        self.stream.close()
        output = b""
        while chunk := self._read():
            output += chunk
        os.close(self._reader)
        rows, column = [""], 0
        for char in output.decode():
            if char == "\r":
                column = 0
            elif char == "\n":
                rows.append("")
            else:
                if column == self.columns:
                    rows.append("")
                    column = 0
                rows[-1] = rows[-1][:column].ljust(column) + char + rows[-1][column + 1 :]
                column += 1
        return [row.rstrip() for row in rows]

    def _read(self) -> bytes:
        try:
            return os.read(self._reader, 65536)
        except OSError:  # how Linux says that the other side is closed and all is read
            return b""


def test_on_a_terminal_the_line_is_redrawn_below_messages():
    terminal = _Terminal(160)
    with ProgressLine(10_000, terminal.stream) as progress:
        progress.update(100, **RECORD, weights=WEIGHTS)  # longer than what follows
        progress.message("checkpoint saved at step 100")
        progress.update(200, **RECORD, weights=WEIGHTS)
        progress.update(300, **RECORD)
    progress.close()
    assert terminal.screen() == ["checkpoint saved at step 100", LINE, ""]


@pytest.mark.parametrize("columns", [20, 40, 80, 100])
def test_a_narrow_terminal_loses_the_least_important_fields(columns):
    terminal = _Terminal(columns)
    with ProgressLine(10_000, terminal.stream) as progress:
        for step in (299, 300):
            progress.update(step, **RECORD, weights=WEIGHTS)
    line, rest = terminal.screen()  # one row and the final newline: it never wrapped
    assert rest == "" and len(line) < columns
    assert line.startswith("step    300/10,000")
    assert ("loss 3.214" in line) == (columns >= 40)
    assert ("eta 3m12s" in line) == (columns >= 80)
    assert "stall" not in line


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999.6, "1.0k"), (1234, "1.2k"), (45_230, "45.2k"), (999_600, "1.0M"),
     (1_228_800, "1.2M"), (99_960_000, "100M"), (300e9, "300B"), (1.2e12, "1.2T")],
)
def test_counts_for_people(number, text):
    assert human(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (192.4, "3m12s"), (3600, "1h00m"), (3840, "1h04m"),
     (86_399.9, "1d00h"), (183_600, "2d03h")],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text


def test_output_is_plain_text():
    stream = io.StringIO()
    ProgressLine(10, stream).update(1, **RECORD, weights=WEIGHTS)
    assert re.fullmatch(r"[ -~]+\n", stream.getvalue())
