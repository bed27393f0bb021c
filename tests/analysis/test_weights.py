"""Statistics of weights against scipy's, and of codes and scales against the rule's equation."""

import jax
import numpy as np
import pytest
from helpers import TERNARY, trained
from scipy import stats

from spectra_jax import config as configs
from spectra_jax.analysis import plots, weights
from spectra_jax.errors import UserError
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.serve.load import load


@pytest.fixture(scope="module")
def quantlm(tmp_path_factory):
    """A 4-bit QuantLM of the tiny FloatLM, groups of 16."""
    out = tmp_path_factory.mktemp("quantlm") / "rtn"
    q = configs.override(configs.Config(family="QuantLM"), ["quantize.method=rtn", "quantize.group=16"])
    return quantize(str(trained()), q, out)


def matrix(run, layer, module, name):
    """A latent matrix of the newest checkpoint."""
    tree = load(str(run), latent=True, devices=jax.devices()[:1]).parameters
    return np.asarray(tree["blocks"][module][name]["w"][layer], np.float64)


def test_a_ternary_run():
    table = weights.table(trained(*TERNARY), bins=(50,))
    assert len(table) == 14 and set(table["step"]) == {12}
    row = table[(table["layer"] == 1) & (table["kind"] == "mlp.up")].iloc[0]
    w = matrix(trained(*TERNARY), 1, "mlp", "up")
    scale = 1e-5 + np.abs(w).mean()
    codes = np.round(np.clip(w / scale, -1, 1))
    assert row["weights"] == w.size and row["mean"] == pytest.approx(w.mean(), abs=1e-7)
    assert row["std"] == pytest.approx(w.std(), rel=1e-6)
    assert row["kurtosis"] == pytest.approx(stats.kurtosis(w, axis=None), rel=1e-5, abs=1e-5)
    assert row["differential_entropy"] == pytest.approx(stats.norm(scale=w.std()).entropy() / np.log(2), rel=1e-6)
    counts = np.histogram(w, 50)[0]
    assert row["entropy_50"] == pytest.approx(stats.entropy(counts, base=2), rel=1e-6)
    assert row["scale"] == row["scale_min"] == row["scale_max"] == pytest.approx(scale, rel=1e-5)
    assert row["zeros"] == np.mean(codes == 0)
    assert row["error"] == pytest.approx(np.linalg.norm(w - scale * codes) / np.linalg.norm(w), rel=1e-5)


def test_a_scale_for_every_shard():
    run = trained(*TERNARY, "model.scale_shards=2")
    row = weights.table(run, bins=()).query("layer == 0 and kind == 'attention.o'").iloc[0]
    halves = np.abs(matrix(run, 0, "attention", "o")).reshape(2, -1).mean(axis=1) + 1e-5  # cut by inputs
    assert (row["scale_min"], row["scale_max"]) == (pytest.approx(halves.min()), pytest.approx(halves.max()))


def test_float_and_quantized_runs(quantlm):
    flt, made = weights.table(trained(), bins=(50,)), weights.table(quantlm, bins=(50,))
    assert not {"scale", "zeros", "error"} & set(flt.columns)
    assert "error" not in made and made["std"].to_numpy() == pytest.approx(flt["std"].to_numpy(), rel=0.05)
    assert made["zeros"].between(0.01, 0.3).all() and (made["scale_min"] < made["scale_max"]).all()
    w = matrix(trained(), 0, "mlp", "down")
    step = np.abs(w.reshape(-1, 16, w.shape[1])).max(axis=1) * 2 / 15  # the grid's 16 levels from end to end
    row = made.query("layer == 0 and kind == 'mlp.down'").iloc[0]
    assert row["scale"] == pytest.approx(step.mean(), rel=1e-2)


def test_a_series():
    table = weights.series(trained(*TERNARY), bins=(20,))
    assert list(table["step"].unique()) == [4, 8, 12] and len(table) == 3 * 14
    last = weights.table(trained(*TERNARY), bins=(20,))
    assert table[table["step"] == 12].reset_index(drop=True).equals(last)


def test_entropies_and_their_figure(tmp_path, quantlm):
    table = weights.entropies([trained(), quantlm], bins=(20, 200))
    assert list(table["linear"]) == [2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)] * 2
    assert (table["entropy_20"] < table["entropy_200"]).all() and (table["differential_entropy"] < 0).all()
    by_matrix = weights.table(trained(), bins=(20,))
    mean = np.average(by_matrix["entropy_20"], weights=by_matrix["weights"])
    assert table["entropy_20"][0] == pytest.approx(mean)
    figure = plots.entropies(table, tmp_path / "entropies.png")
    assert (tmp_path / "entropies.png").stat().st_size > 10_000 and len(figure.axes) == 2


def test_the_uniform_distribution_has_the_entropy_of_its_bins():
    w = np.linspace(-1, 1, 6400, endpoint=False)
    assert weights.shannon_entropy(w, 64) == pytest.approx(6, abs=1e-3)
    assert weights.shannon_entropy(w, 64, (-1, 1)) == pytest.approx(6, abs=1e-3)
    assert weights.shannon_entropy(w, 64, (-2, 2)) == pytest.approx(5, abs=1e-2), "half of the bins are empty"
    assert weights.differential_entropy(0.0254) == pytest.approx(-3.25, abs=0.01), "the paper's 99M"
    assert weights.differential_entropy(0.0200) == pytest.approx(-3.60, abs=0.01)


def test_one_kind_of_matrix(quantlm):
    found = weights.matrix(trained(*TERNARY), "mlp.up")
    assert np.array_equal(found.weights[1], matrix(trained(*TERNARY), 1, "mlp", "up").astype(np.float32))
    w = found.weights.astype(np.float64)
    scale = np.abs(w).mean(axis=(1, 2), keepdims=True) + 1e-5
    assert np.array_equal(found.codes, np.round(np.clip(w / scale, -1, 1)))
    assert weights.matrix(trained(), "attention.q").codes is None
    made = weights.matrix(quantlm, "mlp.up")
    assert made.codes.shape == made.weights.shape and len(np.unique(made.codes)) <= 16
    with pytest.raises(UserError, match="kind='mlp.u' is not one of attention.q, .*; did you mean mlp.up"):
        weights.matrix(trained(), "mlp.u")


def test_no_such_run(tmp_path):
    with pytest.raises(UserError, match="holds no run|does not exist"):
        weights.table(tmp_path / "absent")
