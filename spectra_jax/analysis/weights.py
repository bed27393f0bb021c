"""What weights look like: normal fits, entropies, codes, scales (Spectra, arXiv 2407.12327, 2.2 and appendix E)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float

from spectra_jax.analysis.comparison import label
from spectra_jax.analysis.runs import table as table_of_runs
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.errors import one_of
from spectra_jax.model.matrices import MATRICES, Key
from spectra_jax.model.parameters import block_matrices, freeze, plain
from spectra_jax.serve.load import Loaded, load
from spectra_jax.weights.form import is_form

Span = tuple[float | int, float | int] | None
BINS = (100, 300, 500, 700, 900)  # of the paper's histograms


def table(checkpoint: str | Path, *, bins: Sequence[int] = BINS, span: Span = None) -> pd.DataFrame:
    """Statistics of every block matrix of a checkpoint, one row for each layer and kind.

    Columns:
      step, layer, kind, weights (how many).
      mean, std, kurtosis (excess; 0 for a normal distribution) and differential_entropy (of the normal distribution
        with that std, in bits) of the latent weights; of a model that holds no latent ones, of the effective weights.
      entropy_N: Shannon entropy in bits of their histogram of N bins.
      scale, scale_min, scale_max (over shards, groups or outputs) and zeros (share of codes that are 0), where there
        are codes and scales; error: root mean square of latent minus effective weights, over that of the latent ones.

    Args:
      span: of the histograms; by default from the smallest to the largest weight of the matrix (not stated in the
        paper; its figures draw from -0.4 to 0.4).

    Raises:
      UserError: no such checkpoint.
    """
    model = load(str(checkpoint), latent=None, devices=jax.devices()[:1])
    effective, codes, scales = _parts(model)
    rows = []
    for key, matrix in block_matrices(plain(model.config.model, model.parameters)).items():
        latent = None if is_form(matrix) else np.asarray(matrix, np.float64)
        for layer in range(model.config.model.L):
            shown = effective[key][layer] if latent is None else latent[layer]
            row = {"step": model.step, "layer": layer, "kind": ".".join(key), **_statistics(shown, bins, span)}
            if key in scales:
                s = scales[key][layer]
                row |= {"scale": s.mean(), "scale_min": s.min(), "scale_max": s.max()}
            if key in codes:
                row["zeros"] = float(np.mean(codes[key][layer] == 0))
            if latent is not None and key in effective:
                row["error"] = np.linalg.norm(shown - effective[key][layer]) / np.linalg.norm(shown)
            rows.append(row)
    return pd.DataFrame(rows)


class Matrix(NamedTuple):
    """One kind of matrix of a checkpoint, stacked over layers (L, in, out): latent weights if there are any, else the
    effective ones, and their codes, None of a float model."""

    weights: np.ndarray
    codes: np.ndarray | None


def matrix(checkpoint: str | Path, kind: str) -> Matrix:
    """The matrices of one kind, such as "mlp.up".

    Raises:
      UserError: no such checkpoint or kind.
    """
    key = tuple(one_of(kind, [".".join(key) for key in MATRICES], "kind").split("."))
    model = load(str(checkpoint), latent=None, devices=jax.devices()[:1])
    w, (effective, codes, _) = block_matrices(plain(model.config.model, model.parameters))[key], _parts(model)
    return Matrix(effective[key] if is_form(w) else np.asarray(w), codes.get(key))


def series(run: str | Path, **options: Any) -> pd.DataFrame:
    """`table` of every checkpoint of a run, one below the other."""
    checkpoints = Checkpoints(run)
    steps = checkpoints.chosen(None)
    checkpoints.close()
    return pd.concat([table(f"{run}@{step}", **options) for step in steps], ignore_index=True)


def entropies(runs: Sequence[str | Path], *, bins: Sequence[int] = BINS) -> pd.DataFrame:
    """One row for every run: entropies as in `table`, in the mean over its matrices by their weights.

    Columns: run, label (as in `comparison`), linear (parameters of block matrices), std, differential_entropy,
    entropy_N.
    """
    found, rows = table_of_runs(runs), []
    for run, name in zip(found["folder"], label(found)):
        statistics = table(run, bins=bins)
        named = ["differential_entropy", *(f"entropy_{n}" for n in bins)]
        mean = {key: float(np.average(statistics[key], weights=statistics["weights"])) for key in named}
        spread = float(np.sqrt(np.average(statistics["std"] ** 2, weights=statistics["weights"])))
        rows.append({
            "run": Path(run).name, "label": name, "linear": int(statistics["weights"].sum()), "std": spread, **mean,
        })
    return pd.DataFrame(rows)


def _parts(model: Loaded) -> tuple[dict[Key, np.ndarray], dict[Key, np.ndarray], dict[Key, np.ndarray]]:
    """Effective weights, codes and scales (L, ...) of every kind of matrix that has them."""
    effective, codes, scales = {}, {}, {}
    with jax.set_mesh(model.mesh):
        for key, w in block_matrices(freeze(model.config.model, model.parameters)).items():
            if is_form(w):
                effective[key] = np.asarray(jax.vmap(lambda one: one.dequantize())(w), np.float64)
                found = getattr(w.core, "codes", None), getattr(w.core, "scales", None)
                if found[0] is not None:
                    codes[key] = np.asarray(found[0])
                if found[1] is not None:
                    scales[key] = np.asarray(found[1], np.float64).reshape(model.config.model.L, -1)
    return effective, codes, scales


def _statistics(w: Float[np.ndarray, "m n"], bins: Sequence[int], span: Span) -> dict[str, Any]:
    std = float(w.std())
    entropy = {f"entropy_{n}": shannon_entropy(w, n, span) for n in bins}
    return {
        "weights": w.size, "mean": float(w.mean()), "std": std,
        "kurtosis": float(np.mean((w - w.mean()) ** 4) / std**4 - 3),
        "differential_entropy": differential_entropy(std), **entropy,
    }


def differential_entropy(std: float | int) -> float:
    """Of a normal distribution, in bits: log2(2 pi e std^2) / 2."""
    return float(0.5 * np.log2(2 * np.pi * np.e * std**2))


def shannon_entropy(w: Float[np.ndarray, "..."], bins: int, span: Span = None) -> float:
    """Of the histogram of so many bins from end to end of `span`, in bits; weights beyond it are left out."""
    counts, _ = np.histogram(w, bins, span)
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log2(p)))
