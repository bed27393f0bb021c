"""Accelerators as data, and how memory and bandwidth lag behind arithmetic (Spectra, arXiv 2407.12327, Figure 21)."""

import difflib
from pathlib import Path

import numpy as np
import pandas as pd

from spectra_jax.errors import UserError

# Years to double, as the paper's introduction quotes them (Gholami et al., 2024).
DOUBLING = {"tflops": 1.26, "memory_gb": 2.0, "bandwidth_tbs": 2.9}
RATIOS = {"GB per TFLOP/s": "memory_gb", "TB/s per TFLOP/s": "bandwidth_tbs"}


def table() -> pd.DataFrame:
    """One row a device: name, vendor, year of release, dense 16-bit TFLOP/s, GB, TB/s, memory, certainty, source.

    "recalled" figures were written down from memory of the source, "documented" ones read in it.
    """
    return pd.read_csv(Path(__file__).with_name("accelerators.csv"))


def find(name: str) -> pd.Series:
    """A device of the table by its name, or by what it begins with ("H100": the first such row).

    Raises:
      UserError: there is none; the message names the nearest.
    """
    known = table()
    found = known[known["name"].str.lower().str.startswith(name.lower())]
    if found.empty:
        near = difflib.get_close_matches(name, known["name"], n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known['name'])}"
        raise UserError(f"unknown device {name!r}; {hint}")
    return found.iloc[0]


def ratios() -> pd.DataFrame:
    """GB and TB/s for each TFLOP/s of every device with stacked memory."""
    known = table()
    known = known[known["memory"] == "HBM"].reset_index(drop=True)
    return known.assign(**{name: known[column] / known["tflops"] for name, column in RATIOS.items()})


def trends() -> pd.DataFrame:
    """For each ratio and vendor the straight line through its devices: slope a year, and the line's value in 2024."""
    rows = []
    for name in RATIOS:
        for vendor, devices in ratios().groupby("vendor", sort=False):
            slope, level = np.polyfit(devices["year"] - 2024.0, devices[name], 1)
            rows.append((name, vendor, len(devices), slope, level))
    return pd.DataFrame(rows, columns=["ratio", "vendor", "devices", "slope", "in_2024"])
