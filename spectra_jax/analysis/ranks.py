"""How far the order of models by one measure is their order by another."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

FEWEST = 3  # of two models, the order is the same or the opposite: that says nothing
DRAWS = 9999  # orders tried; from 3 to 7 models that is all of them


def correlations(values: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of the bits per byte of every text with every metric of every task (values: `axes.table`).

    Bits per byte, for tokenizers may differ; with one tokenizer their order is that of perplexity. -1 says that the
    better a model predicts the text the higher it stands at the task. Spearman's rho and Kendall's tau (tau-b), each
    with a p-value: the share of orders of the models that are as far from no correlation, of all orders up to 7
    models and beyond of 9,999 drawn ones. With n models no p-value is below 2 / n!.

    Returns:
      text, axis, of, metric, models, spearman, spearman_p, kendall, kendall_p, note. NaN, with a note that says so,
      for fewer than 3 models and where all are alike.
    """
    quality = values[(values["axis"] == "capacity") & (values["metric"] == "bits_per_byte")]
    tasks = values[values["axis"].isin(["capacity", "alignment"]) & ~values["of"].isin(quality["of"])]
    rows = []
    for text, some in quality.groupby("of", sort=False):
        for (axis, of, metric), others in tasks.groupby(["axis", "of", "metric"], sort=False):
            pairs = some[["run", "value"]].merge(others[["run", "value"]], on="run").dropna()
            found = rank_correlation(pairs["value_x"].to_numpy(float), pairs["value_y"].to_numpy(float))
            rows.append({"text": text, "axis": axis, "of": of, "metric": metric, "models": len(pairs), **found})
    columns = ["text", "axis", "of", "metric", "models", "spearman", "spearman_p", "kendall", "kendall_p", "note"]
    return pd.DataFrame(rows, columns=columns)


def rank_correlation(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> dict[str, float | str]:
    """Spearman's and Kendall's coefficients of n pairs with p-values by permutation, two-sided."""
    names = ("spearman", "spearman_p", "kendall", "kendall_p")
    if len(x) < FEWEST:
        return dict.fromkeys(names, np.nan) | {"note": f"fewer than {FEWEST} models"}
    if not np.ptp(x) or not np.ptp(y):
        return dict.fromkeys(names, np.nan) | {"note": "all alike"}
    ranks, signs = stats.rankdata(y), np.sign(y[:, None] - y)

    def products(order: Float[np.ndarray, "*p n"], axis: int = -1) -> np.ndarray | np.float64:
        return (order * (ranks - ranks.mean())).sum(axis)  # all of rho that depends on the order

    def concordance(order: Float[np.ndarray, "*p n"], axis: int = -1) -> np.ndarray | np.float64:
        return (np.sign(order[..., :, None] - order[..., None, :]) * signs).sum((-2, -1))

    return {
        "spearman": float(stats.spearmanr(x, y).statistic), "spearman_p": _p(stats.rankdata(x), products),
        "kendall": float(stats.kendalltau(x, y).statistic), "kendall_p": _p(stats.rankdata(x), concordance), "note": "",
    }


def _p(x: Float[np.ndarray, "n"], statistic: Callable) -> float:
    found = stats.permutation_test((x,), statistic, permutation_type="pairings", vectorized=True, n_resamples=DRAWS,
                                   batch=1000, random_state=0)
    return float(found.pvalue)
