"""Figures are written whole, are not blank, and say what they show."""

import json
import os

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from spectra_jax.analysis import plots
from spectra_jax.analysis.plots import curves
from spectra_jax.errors import UserError
from spectra_jax.metrics import MetricsWriter

ORANGE, BLUE = plots.FAMILIES["TriLM"][0], plots.FAMILIES["FloatLM"][0]


def make_run(workdir, *, config=None, offset=0.0, steps=200, interventions=False):
    """A workdir as training leaves it: noisy falling losses, a validation every 50 steps."""
    rng = np.random.default_rng(0)
    with MetricsWriter(workdir) as writer:
        for step in range(1, steps + 1):
            loss = 3 + offset + 4 * (1 + step / 10) ** -0.7
            tokens = step * 4096
            noisy = float(loss + rng.normal() * 0.05)
            writer.write(step, "train", {"loss": noisy, "tokens": tokens, "lr": 1e-3})
            if step % 50 == 0:
                writer.write(step, "eval", {"loss": loss, "loss_se": 0.01})  # no tokens: by step
        if interventions:
            writer.event(steps // 2, "peak lowered", lr=5e-4)
            writer.event(2 * steps // 3, "decay removed")
            writer.event(steps, "checkpoint saved")
    if config is not None:
        (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def assert_picture(path, *, width=1050):
    """A PNG of a column's width at 300 dpi with more on it than paper."""
    image = imread(path)[..., :3]
    assert image.shape[1] == width and image.shape[0] >= 500
    assert 0.01 < (image.min(axis=-1) < 0.95).mean() < 0.9
    assert [name for name in os.listdir(path.parent) if name.startswith(".")] == []


def legend_texts(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def line(figure, label):
    return next(each for each in figure.axes[0].lines if str(each.get_label()).startswith(label))


def test_plot_runs_draws_families_over_each_other(tmp_path):
    first = make_run(tmp_path / "a", config={"family": "FloatLM", "name": "float-tiny"})
    second = make_run(
        tmp_path / "b", config={"family": "TriLM", "name": "tri"}, offset=0.1, interventions=True
    )
    figure = plots.plot_runs([first, str(second)], tmp_path / "out" / "loss.png")
    assert_picture(tmp_path / "out" / "loss.png")
    last = 3 + 4 * (1 + 20) ** -0.7
    assert legend_texts(figure) == [
        f"float-tiny (validation {last:.3f})", f"tri (validation {last + 0.1:.3f})"
    ]
    assert line(figure, "float-tiny").get_color() == BLUE
    assert line(figure, "tri").get_color() == ORANGE
    axes = figure.axes[0]
    assert axes.get_xlabel() == "training tokens"
    assert axes.get_ylabel() == "loss (nats per token)"
    assert "validation" in axes.get_title()
    marks = {text.get_text(): text.xy[0] for text in axes.texts}
    assert marks == {"peak\nlowered": 100 * 4096, "decay\nremoved": 133 * 4096}
    validation = next(each for each in axes.lines if each.get_linestyle() == "None")
    assert list(validation.get_xdata()) == [step * 4096 for step in (50, 100, 150, 200)]


def test_runs_of_one_family_are_told_apart(tmp_path):
    runs = [
        make_run(tmp_path / name, config={"family": "TriLM", "name": name}, interventions=True)
        for name in ("both", "neither")
    ]
    figure = plots.plot_runs(runs, tmp_path / "arms.png", x="step")
    assert line(figure, "both").get_color() != line(figure, "neither").get_color()
    assert len(figure.axes[0].texts) == 2  # shared interventions are marked once
    assert figure.axes[0].get_xlabel() == "optimizer step"


def test_two_runs_of_a_family_beside_another_differ_in_dashes(tmp_path):
    records = [{"step": s, "kind": "train", "tokens": s, "loss": 9.0 - s} for s in range(1, 6)]
    runs = dict.fromkeys(("TriLM a", "TriLM b", "BiLM"), records)
    figure = plots.loss_curves(runs, tmp_path / "x.svg")
    first, second = line(figure, "TriLM a"), line(figure, "TriLM b")
    assert first.get_color() == second.get_color() == ORANGE
    assert first.is_dashed() != second.is_dashed()
    assert "TriLM b" in (tmp_path / "x.svg").read_text()


def test_names_fall_back_to_folders_and_stay_apart(tmp_path):
    plain = make_run(tmp_path / "trilm-x")
    other = make_run(tmp_path / "again", config={"name": "trilm-x"})
    figure = plots.plot_runs([plain, other, other], tmp_path / "x.pdf")
    names = [text.split(" (validation")[0] for text in legend_texts(figure)]
    assert names == ["trilm-x", "trilm-x (again)", "trilm-x (again) #3"]
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


def test_the_average_is_a_two_sided_exponential_window():
    values = np.random.default_rng(1).normal(size=40)
    smoothed = curves._smoothed(values, 0.1)  # a window of 4 points: decay 3/4
    distance = np.abs(np.subtract.outer(np.arange(40), np.arange(40)))
    weights = 0.75**distance
    np.testing.assert_allclose(smoothed, weights @ values / weights.sum(1), rtol=1e-12)
    np.testing.assert_array_equal(curves._smoothed(values, 0), values)
    straight = np.arange(51.0)
    assert curves._smoothed(straight, 0.1)[25] == pytest.approx(25)  # a one-sided one would lag


def test_gaps_from_skipped_steps_are_left_out(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 30):
            loss = float("nan") if step % 7 == 0 else 5.0 - step / 10
            writer.write(step, "train", {"loss": loss, "tokens": step})
    figure = plots.plot_runs([tmp_path], tmp_path / "x.png", smooth=0)
    assert len(line(figure, tmp_path.name).get_xdata()) == 25


def test_plot_errors_name_the_cause(tmp_path):
    out = tmp_path / "x.png"
    with pytest.raises(UserError, match="no runs"):
        plots.plot_runs([], out)
    with pytest.raises(UserError, match="no folder .*absent"):
        plots.plot_runs([tmp_path / "absent"], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no metrics.jsonl"):
        plots.plot_runs([tmp_path / "empty"], out)
    MetricsWriter(tmp_path / "empty").close()
    with pytest.raises(UserError, match="'empty' has no train losses"):
        plots.plot_runs([tmp_path / "empty"], out)
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="no 'hours' to draw against; it has loss, lr, step, tok"):
        plots.plot_runs([run], out, x="hours")
    with pytest.raises(UserError, match="use .png, .pdf or .svg"):
        plots.plot_runs([run], tmp_path / "x.jpeg")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*choose another"):
        plots.plot_runs([run], tmp_path / "file" / "x.png")
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        plots.plot_runs([run], out)
    assert not out.exists()


ROWS = [
    {"name": "FloatLM", "family": "FloatLM", "bits": 1.1e8, "loss": 3.21, "loss_se": 0.02},
    {"name": "TriLM 99m", "family": "TriLM", "bits": 45_000_000, "loss": 3.31, "loss_se": 0.03},
]


def test_bits_versus_loss_has_a_point_and_a_bar_per_model(tmp_path):
    figure = plots.bits_versus_loss(ROWS, tmp_path / "bits.png")
    assert_picture(tmp_path / "bits.png")
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "model size (stored bits)"
    assert axes.get_ylabel() == "loss (nats per token)"
    assert legend_texts(figure) == ["FloatLM", "TriLM"]
    assert [text.get_text() for text in axes.texts] == ["99m", ""]  # by size; what the legend does not say
    for row, bars in zip(ROWS, axes.containers, strict=True):
        (point,) = bars[0].get_xydata()
        assert tuple(point) == (row["bits"], row["loss"])
        (segment,) = bars[2][0].get_segments()
        assert np.ptp(segment[:, 1]) == pytest.approx(2 * row["loss_se"])
    with pytest.raises(UserError, match="no models"):
        plots.bits_versus_loss([], tmp_path / "none.png")


def test_bit_widths_of_quantlm_get_lines_of_their_own(tmp_path):
    rows = [
        {"name": f"{p}-{b}", "family": f"QuantLM-{b}", "bits": p * b * 1e9, "loss": 4 - p / b}
        for b in (3, 4) for p in (4, 1, 2)
    ] + ROWS
    figure = plots.bits_versus_loss(rows, tmp_path / "bits.png")
    three, four = figure.axes[0].containers[:2]
    assert list(three[0].get_xdata()) == [3e9, 6e9, 12e9]
    assert three[0].get_color() == four[0].get_color() == plots.FAMILIES["QuantLM"][0]
    assert three[0].get_linestyle() != four[0].get_linestyle()


def test_weight_histograms_show_densities_and_shares(tmp_path):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 80)).astype(np.float32)
    ternary = np.clip(np.rint(w / np.abs(w).mean()), -1, 1).astype(np.int8)
    binary = np.where(w < 0, -1, 1).astype(np.int8)
    figure = plots.weight_histograms(
        {"FloatLM up": w, "TriLM up": w, "BiLM up": w},
        {"FloatLM up": None, "TriLM up": ternary, "BiLM up": binary},
        tmp_path / "weights.png",
    )
    assert_picture(tmp_path / "weights.png")
    float_left, float_right, tri_left, tri_right, bi_left, bi_right = figure.axes
    assert float_left.get_title(loc="left") == "FloatLM up"
    assert bi_left.get_xlabel() == "latent weight / mean magnitude"
    assert "no codes" in float_right.texts[0].get_text()
    heights, edges, _ = tri_left.patches[0].get_data()
    inside = np.mean(np.abs(w / np.abs(w).mean()) <= 4)
    assert (heights * np.diff(edges)).sum() == pytest.approx(inside)
    shares = [bar.get_height() for bar in tri_right.patches]
    assert shares == pytest.approx([100 * np.mean(ternary == code) for code in (-1, 0, 1)])
    assert [text.get_text() for text in tri_right.texts] == [f"{share:.1f}" for share in shares]
    assert len(tri_left.lines) == 2 and len(bi_left.lines) == 0  # the thresholds
    assert [tick.get_text() for tick in bi_right.get_xticklabels()] == ["-1", "+1"]
    with pytest.raises(UserError, match="no weights"):
        plots.weight_histograms({}, {}, tmp_path / "none.png")


def test_drawing_leaves_global_style_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.bits_versus_loss(ROWS, tmp_path / "bits.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("name", "family"),
    [("FloatLM", "FloatLM"), ("trilm-99m", "TriLM"), ("QuantLM-4", "QuantLM"), ("llama", "")],
)
def test_family_of_a_name(name, family):
    assert plots.family_of(name) == family
