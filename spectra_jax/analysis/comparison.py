"""A suite of runs compared as the paper compares: families at equal size, at equal bits, arms of the schedule.

Every function takes the table of `analysis.runs`. A gap is the difference of two runs' losses on the same held-out
sequences, and has two sources of error: the text, known from the sequences, and the seed, known where a pair was
trained with several. Where it was trained once, the seed's share is taken from the sizes with several.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from spectra_jax.analysis import runs
from spectra_jax.analysis.scaling_laws import Fit, comparable, fit
from spectra_jax.errors import UserError

PAIRS = (("TriLM", "FloatLM"), ("BiLM", "TriLM"), ("BitNet", "TriLM"))
SIZES = 4  # at least, of a family that a law is fitted to
SHAPE = ["D", "F", "L", "V", "tokens"]  # what two models of a gap have in common, beside the seed


def label(table: pd.DataFrame) -> pd.Series:
    """What a model is called beside others: QuantLM 4-bit, TriLM, TriLM neither (an arm of the schedule)."""
    names = table["family"].where(table["bits"].isna(), table["family"] + " " + table["bits"].map("{:.0f}-bit".format))
    other = (table["weight"] != "float") & (table["arm"] != "both")
    return names.where(~other, names + " " + table["arm"])


def main_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The models at the largest token count of the suite with the schedule as published, labelled.

    Raises:
      UserError: models of different data or tokenizers.
    """
    comparable(table)
    table = table.assign(label=label(table))
    whole = (table["tokens"] == table["tokens"].max()) & ((table["weight"] == "float") | (table["arm"] == "both"))
    return table[whole].reset_index(drop=True)


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Labelled rows with one for each label and shape: the mean over its seeds."""
    table = table.assign(label=table["label"] if "label" in table else label(table))
    return table.groupby(["label", *SHAPE], as_index=False, sort=False).mean(numeric_only=True)


def gaps(table: pd.DataFrame, pairs: Sequence[tuple[str, str]] = PAIRS) -> pd.DataFrame:
    """How far the loss of one label lies above another's at every size where both were trained.

    Columns: pair ("TriLM - FloatLM"), parameters, the SHAPE, seeds (how many), gap (mean over seeds), text (standard
    error of the text), seed (of the seeds), error (both together).

    Raises:
      UserError: no size at which a pair was trained with the same seed, or runs that no sweep measured.
    """
    table = table.assign(label=label(table))
    found = []
    for worse, better in pairs:
        both = table[table["label"] == worse].merge(table[table["label"] == better], on=[*SHAPE, "seed"])
        for shape, seeds in both.groupby(SHAPE, sort=True):
            each = [runs.above(a, b) for a, b in zip(seeds["folder_x"], seeds["folder_y"])]
            values, errors = np.array(each).T
            found.append({
                "pair": f"{worse} - {better}", "parameters": int(seeds["parameters_x"].iloc[0]),
                **dict(zip(SHAPE, shape)), "seeds": len(values), "gap": values.mean(),
                # Sequences are the same for all seeds: their errors go together and are not averaged away.
                "text": errors.mean(), "spread": values.std(ddof=1) if len(values) > 1 else np.nan,
            })
    if not found:
        raise UserError(f"no two runs of {', '.join(f'{a} and {b}' for a, b in pairs)} have shape, tokens and seed in "
                        "common")
    return _with_errors(pd.DataFrame(found))


def _with_errors(found: pd.DataFrame) -> pd.DataFrame:
    """`spread` of the seeds to a standard error of the mean; of single seeds by the pair's pooled spread."""

    def pooled(spreads: pd.Series) -> float:
        known = spreads.dropna()
        return float(np.sqrt((known**2).mean())) if len(known) else np.nan

    spread = found["spread"].fillna(found.groupby("pair")["spread"].transform(pooled))
    seed = spread / np.sqrt(found["seeds"])
    return found.drop(columns="spread").assign(seed=seed, error=np.hypot(found["text"], seed.fillna(0.0)))


def trend(found: pd.DataFrame) -> pd.DataFrame:
    """For each pair the straight line of the gap over log2 of the parameters: change for each doubling, 95 % interval.

    Needs three sizes; weights are those of the errors, and the interval is Student's with the line's own residuals.
    """
    rows = []
    for pair, of in found[found["tokens"] == found["tokens"].max()].groupby("pair", sort=False):
        if len(of) < 3:
            continue
        weight = 1 / of["error"].to_numpy()
        design = np.stack([np.ones(len(of)), np.log2(of["parameters"])], axis=1) * weight[:, None]
        solved, residual, _, _ = np.linalg.lstsq(design, of["gap"] * weight, rcond=None)
        free = len(of) - 2
        error = np.sqrt(float(residual[0]) / free * np.linalg.inv(design.T @ design)[1, 1])
        reach = stats.t.ppf(0.975, free) * error
        rows.append((pair, len(of), solved[1], solved[1] - reach, solved[1] + reach))
    return pd.DataFrame(rows, columns=["pair", "sizes", "for_each_doubling", "low", "high"])


def arms(table: pd.DataFrame) -> pd.DataFrame:
    """The arms of the schedule above the one with both interventions, wherever they were trained (as `gaps`)."""
    others = [f"TriLM {arm}" for arm in runs.ARMS.values() if arm != "both"]
    return gaps(table, [(arm, "TriLM") for arm in others])


def quantized(table: pd.DataFrame) -> pd.DataFrame:
    """QuantLMs above the FloatLM that they were made of, at every size (as `gaps`)."""
    made = table.assign(label=label(table))[table["bits"].notna()].sort_values("bits", ascending=False)
    return gaps(table, [(name, "FloatLM") for name in made["label"].unique()])


def laws(table: pd.DataFrame, **options: object) -> dict[str, Fit]:
    """Fits of the families of a suite, those that have enough sizes.

    "size" and "power" of the trained families against parameters; "bits" and "block_bits" of all labels against the
    bits of whole models and of their block matrices; "tokens" of size and tokens, where there are three budgets.

    Raises:
      UserError: no family with enough sizes, or as `scaling_laws.fit`.
    """
    rows, everything = main_rows(table), table.assign(label=label(table))
    sizes = rows.groupby("label")["D"].transform("nunique")
    if not (sizes[rows["bits"].isna()] >= SIZES).any():
        raise UserError(f"no family was trained at {SIZES} sizes or more, which a law needs; there are at most "
                        f"{sizes.max()}")
    rows = rows[sizes >= SIZES]
    trained = rows[rows["bits"].isna()]
    budgets = everything[everything["label"].isin(["FloatLM", "TriLM"])]
    budgets = budgets[budgets.groupby("label")["tokens"].transform("nunique") >= 3]
    found = {
        "size": fit(trained, group="label", **options),
        "power": fit(trained, "power", group="label", **options),
        "bits": fit(rows, x="stored_bits", group="label", **options),
        "block_bits": fit(rows, x="block_bits", group="label", **options),
    }
    return found | ({"tokens": fit(budgets, "joint", group="label", **options)} if len(budgets) else {})


def best_at(law: Fit, sizes: Sequence[float | int] | None = None) -> pd.DataFrame:
    """Which group of a fit has the lowest loss at a size, where the points of two or more reach so far.

    Of laws of stored bits by width this is the question of k-bit scaling laws (arXiv 2212.09720): which width is best
    for so many bits in all.

    Args:
      sizes: by default 25 from the smallest to the largest point, evenly on a log scale.
    """
    points = law.points
    group = next(name for name in points if set(points[name]) == set(law.law.constants))
    if sizes is None:
        sizes = np.geomspace(points[law.x].min(), points[law.x].max(), 25)
    rows = []
    for size in sizes:
        reached = [name for name, of in points.groupby(group) if of[law.x].min() <= size <= of[law.x].max()]
        losses = {name: float(law.law(name, size)) for name in reached}
        order = sorted(losses, key=losses.__getitem__)
        if len(order) > 1:
            rows.append((size, order[0], losses[order[0]], order[1], losses[order[1]] - losses[order[0]]))
    return pd.DataFrame(rows, columns=[law.x, "best", "loss", "next", "ahead_by"])
