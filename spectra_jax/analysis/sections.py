"""The analyses by name, each as a section: a text, tables and figures for `spectra analyze` and `spectra report`.

A new analysis is a function here that returns a Section, and a line in SECTIONS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from spectra_jax.analysis import accelerators, axes, comparison, deployment, plots, published, ranks, runs, weights
from spectra_jax.analysis import dynamics as motions
from spectra_jax.analysis.scaling_laws import Fit, fit
from spectra_jax.errors import UserError
from spectra_jax.schema import Config

PERCENTS = (2, 3, 4, 5, 6, 8, 10)
CURVES = 6  # more over each other cannot be told apart


@dataclass
class Section:
    """What one analysis found; tables and figures by the names of their files."""

    title: str
    text: str = ""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)


def scaling(
    folders: Sequence[str], *, form: str = "offset", x: str = "parameters", method: str = "lm",
    shared: Sequence[str] = (),
) -> Section:
    """Laws of loss against size, of one's own runs or, without runs, the published ones."""
    if not folders:
        return Section(
            "Published scaling laws",
            "N(k) is the size from which on TriLM is within k per cent of FloatLM. The figure's formula gives its own "
            "marks back; the constants of equation 1 as printed do not: N(k) divides by (1 + k) E_F - E_T, a "
            "difference of nearly equal numbers (at 6 %: 0.0167 by the figure's constants, 0.0102 by the rounded "
            "ones), to the power of 1 / 0.26.",
            {"size_within": published.size_within()},
            {"laws": plots.published_laws({"equation 1": published.EQUATION_1, "figure 10": published.FIGURE_10})},
        )
    table = comparison.main_rows(runs.table(folders))
    if form == "joint":
        table = runs.table(folders).assign(label=lambda t: comparison.label(t))
    found = fit(table, form, x=x, group="label", method=method, shared=shared)
    section = Section(
        f"Scaling law {form!r}: loss against {x}",
        f"{len(found.points)} models, standard deviation of the residuals {found.residual:.4f}.",
        {"constants": found.constants}, {} if form == "joint" else {"scaling": plots.scaling(found)},
    )
    if {"TriLM", "FloatLM"} <= set(found.law.constants) and form != "joint":
        section.tables["size_within"] = found.within("TriLM", "FloatLM", PERCENTS)
    return section


def bits(folders: Sequence[str], *, x: str = "stored_bits", form: str = "offset") -> Section:
    """Loss against bits, and which width is best for so many of them; without runs, the paper's benchmarks."""
    if not folders:
        return Section("Published benchmarks against bits", tables={"bits": published.table("bits")},
                       figures={"benchmark": plots.benchmark(published.benchmarks())})
    rows = comparison.main_rows(runs.table(folders))
    found = fit(rows, form, x=x, group="label")
    return Section(
        f"Loss against {x}", "The best label for so many bits in all, among those whose models reach there.",
        {"constants": found.constants, "best": comparison.best_at(found)}, {"bits": plots.scaling(found)},
    )


def suite(folders: Sequence[str]) -> Section:
    """A suite compared as the paper compares: gaps, arms of the schedule, QuantLMs, laws."""
    table = runs.table(_some(folders))
    section = Section(
        "Families compared",
        "Gaps are in nats per token, between models of one shape, seed and data, on the same held-out sequences; "
        "error: one standard error of text and seed together.", {"runs": table},
    )
    _add(section, "gaps", lambda: comparison.gaps(table))
    if "gaps" in section.tables:
        section.tables["gap_trend"] = comparison.trend(section.tables["gaps"])
        section.figures["gaps"] = plots.gaps(section.tables["gaps"].query("tokens == tokens.max()"))
    _add(section, "arms", lambda: comparison.arms(table))
    if table["bits"].notna().any():
        _add(section, "quantized", lambda: comparison.quantized(table))
    if "quantized" in section.tables:
        section.figures["quantized"] = plots.gaps(section.tables["quantized"])
    rows = comparison.over_seeds(comparison.main_rows(table))
    rows = rows.assign(bits=rows["stored_bits"], family=rows["label"], name=rows["label"])
    section.figures["bits_versus_loss"] = plots.bits_versus_loss(rows.to_dict("records"))
    _add(section, "laws", lambda: _laws(section, table))
    return section


def _laws(section: Section, table: pd.DataFrame) -> pd.DataFrame:
    found = comparison.laws(table)
    for name, law in found.items():
        if name in ("size", "bits", "block_bits"):
            section.figures[f"law_of_{name}"] = plots.scaling(law)
        if name in ("bits", "block_bits"):
            section.tables[f"best_for_{name}"] = comparison.best_at(law)
    return _constants(found)


def _constants(found: Mapping[str, Fit]) -> pd.DataFrame:
    return pd.concat(
        [law.constants.assign(law=name, models=len(law.points), residual=law.residual) for name, law in found.items()],
        ignore_index=True,
    )


def _add(section: Section, name: str, make: Callable[[], pd.DataFrame]) -> None:
    """A table, where the runs are such that it can be made; else the reason, in the section's text."""
    try:
        section.tables[name] = make()
    except UserError as error:
        section.text += f" No {name.replace('_', ' ')}: {error}."


def memory(
    folders: Sequence[str] = (), *, config: Config | None = None, device: Sequence[str] = (), context: int = 0,
    sequences: int = 1,
) -> Section:
    """What fits where, and how fast memory lets it decode: Llama's shapes with the paper's claims, or one config's."""
    shapes = tuple(deployment.SHAPES.values()) if config is None else (deployment.Shape.of(config.name, config.model),)
    table = deployment.table(shapes, context=context, sequences=sequences)
    fits = deployment.fits(table, device) if device else deployment.fits(table)
    section = Section(
        "Deployment", "By arithmetic: " + ("shapes of the Llama family, 128k tokens, " if config is None else "")
        + "embedding and head in 16 bits; a model of half the bytes decodes twice as fast.",
        {"memory": table, "fits": fits},
    )
    if config is None:
        section.tables["claims"] = deployment.claims()
        section.figures |= {"memory": plots.memory(table), "speedup": plots.speedup(table)}
    return section


def hardware(folders: Sequence[str] = ()) -> Section:
    """Accelerators: memory and bandwidth against arithmetic over the years."""
    return Section("Accelerators", "Straight lines through each vendor's devices with stacked memory.",
                   {"accelerators": accelerators.table(), "trends": accelerators.trends()},
                   {"hardware": plots.hardware()})


def statistics(folders: Sequence[str]) -> Section:
    """Weights: entropies of the runs, and every matrix of the largest, a TriLM if there is one."""
    first = comparison.main_rows(runs.table(_some(folders))).drop_duplicates(["label", *comparison.SHAPE])
    largest = first.assign(ternary=first["weight"] == "ternary").sort_values(["ternary", "parameters"]).iloc[-1]
    found = weights.entropies(list(first["folder"]))
    return Section(
        "Weights", f"Entropies in bits, of the first seed; matrices of {largest['run']}.",
        {"entropies": found, "matrices": weights.table(largest["folder"])}, {"entropies": plots.entropies(found)},
    )


def dynamics(folders: Sequence[str], *, batches: int = 4) -> Section:
    """What training did to weights and to the loss around them, over the checkpoints that one run kept."""
    found = runs.expand(_some(folders))
    if len(found) != 1:
        raise UserError(f"dynamics are of one run; {len(found)} are named")
    run = found[0]
    moved, around, marks = motions.updates(run), motions.landscape(run, batches=batches), motions.marks(run)
    return Section(f"Dynamics of {run}", "; ".join(f"step {step}: {text}" for step, text in marks.items()),
                   {"updates": moved, "landscape": around}, {"dynamics": plots.dynamics(moved, around, marks)})


def papers(
    folders: Sequence[str] = (), *, task: str = "commonsense", metric: str = "avg6", own: Sequence[str] = ()
) -> Section:
    """Every table of the papers, and a benchmark against parameters and bits, one's own results in the same axes."""
    tables, mine = {name: make() for name, (_, make) in published.TABLES.items()}, None
    if own:
        tables["own"] = published.own(own)
        mine = tables["own"].query("task == @task and metric == @metric")
        if mine.empty:
            raise UserError(f"{', '.join(own)} have no {task} {metric}; choose another --task and --metric")
    figure = plots.benchmark(published.benchmarks(), task=task, metric=metric, own=mine)
    return Section("Published results", tables=tables, figures={"benchmark": figure})


def curves(folders: Sequence[str]) -> Section:
    """Loss curves of runs that were trained, and where their time went."""
    found = [run for run in runs.expand(_some(folders)) if runs.is_trained(run)]
    if not found:
        raise UserError("none of the runs was trained here: there are no metrics to draw")
    drawn = runs.table(found).sort_values(["seed", "parameters", "tokens"], ascending=[True, False, False])
    drawn = list(drawn["folder"])[:CURVES]
    return Section("Training", f"Drawn are the {CURVES} largest." if len(found) > CURVES else "",
                   {"time": runs.times(found)}, {"loss": plots.plot_runs(drawn)})


def three_axes(
    folders: Sequence[str], *, texts: Sequence[str] = (), tasks: Sequence[str] = (), alignment: Sequence[str] = (),
    limit: int | None = None, weights: str = "dense",
) -> Section:
    """Capacity, alignment and efficiency of runs, and whether perplexity ranks them as tasks do.

    With files, it measures first (`axes.measure`); without, it reads what was measured of the runs before.
    """
    if texts or tasks or alignment:
        axes.measure(_some(folders), texts=texts, tasks=tasks, alignment=alignment, limit=limit, weights=weights)
    values = axes.table(_some(folders))
    section = Section(
        "Capacity, alignment, efficiency",
        f"{values['run'].nunique()} models. Bytes per token are the least that decoding reads, by arithmetic; tokens "
        "per second are of the machine in the last column, and only their ratios say much of another one. Rank "
        "correlations are with bits per byte (of one tokenizer: the order of perplexity), -1 where the better the text "
        "is predicted the higher the metric; p-values by permutation.",
        {"axes": values} | {name: axes.along(values, name) for name in axes.AXES},
    )
    section.tables = {name: table for name, table in section.tables.items() if len(table)}
    section.tables["rank_correlation"] = found = ranks.correlations(values)
    if found.empty:
        del section.tables["rank_correlation"]
    elif found["models"].max() >= ranks.FEWEST:
        section.figures["task_against_text"] = plots.against_text(values, found)
    return section


def _some(folders: Sequence[str]) -> Sequence[str]:
    if not folders:
        raise UserError("no runs are named; give their folders, or that of a sweep")
    return folders


SECTIONS: Mapping[str, Callable[..., Section]] = {
    "scaling": scaling, "bits": bits, "suite": suite, "deployment": memory, "hardware": hardware,
    "weights": statistics, "dynamics": dynamics, "published": papers, "training": curves, "axes": three_axes,
}
