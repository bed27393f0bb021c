"""Updates against numpy; the landscape against finite differences of transformers' loss in float64."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from helpers import TERNARY, data, trained
from llama import llama_of

from spectra_jax.analysis import dynamics, plots
from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.model.matrices import MATRICES
from spectra_jax.serve.load import load
from spectra_jax.train.workdir import read_config

STEPS = (4, 8, 12)


def parameters(run: Path, step: int) -> dict:
    """Latent parameters on the host."""
    return jax.tree.map(np.asarray, load(f"{run}@{step}", latent=True, devices=jax.devices()[:1]).parameters)


def ternarised(tree: dict) -> tuple[dict, dict]:
    """Effective parameters and codes, by the paper's equation on every matrix of every layer."""
    found, codes = jax.tree.map(np.copy, tree), {}
    for module, name in MATRICES:
        w = tree["blocks"][module][name]["w"]
        scale = 1e-5 + np.abs(w).mean(axis=(1, 2), keepdims=True, dtype=np.float32)
        codes[module, name] = np.round(np.clip(w / scale, -1, 1))
        found["blocks"][module][name]["w"] = (scale * codes[module, name]).astype(np.float32)
    return found, codes


def test_updates_by_hand():
    run = trained(*TERNARY)
    table = dynamics.updates(run)
    assert len(table) == 2 * 2 * 7 and list(table["step"].unique()) == [8, 12] and set(table["steps"]) == {4}
    trees = [parameters(run, step) for step in STEPS]
    effective, codes = zip(*map(ternarised, trees))
    for i in (1, 2):
        for (module, name), layer in (((m, n), layer) for m, n in MATRICES for layer in (0, 1)):
            row = table[(table["step"] == STEPS[i]) & (table["layer"] == layer)
                        & (table["kind"] == f"{module}.{name}")].iloc[0]
            for kind, points in (("latent", trees), ("effective", effective)):
                now, before = (points[k]["blocks"][module][name]["w"][layer] for k in (i, i - 1))
                change = np.abs(now - before)
                assert row[f"{kind}_max"] == pytest.approx(change.max(), rel=1e-4)
                assert row[f"{kind}_mean"] == pytest.approx(change.mean(), rel=1e-4)
            flips = np.mean(codes[i][module, name][layer] != codes[i - 1][module, name][layer])
            assert row["flips"] == flips > 0
    assert (table["tokens"] == table["step"] * 8 * 16).all()


def oracle(run: Path, batches: int):
    """The mean loss of the run's first batches as a function of effective parameters, in float64, by transformers."""
    m, seed = read_config(run).model, read_config(run).seed
    loader = Loader([(data(), 1.0)], split="train", T=16, B=8, V=304, seed=seed)
    tokens = torch.tensor(np.concatenate([loader.batch_at(step) for step in range(batches)])).long()

    def loss(tree: dict) -> float:
        with torch.no_grad():
            logits = llama_of(m, tree, torch.float64)(tokens[:, :-1]).logits
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    return loss


def along(tree: dict, way: dict, t: float) -> dict:
    """tree + t * way, in float64."""
    return jax.tree.map(lambda x, d: x.astype(np.float64) + t * d, tree, way)


@pytest.mark.parametrize("family", [TERNARY, ()], ids=["ternary", "float"])
def test_the_landscape_by_finite_differences(family):
    """Loss, first and second derivative along the effective weights, from losses alone."""
    run = trained(*family)
    table, loss = dynamics.landscape(run, batches=2), oracle(run, 2)
    assert list(table["step"]) == [4, 8]
    latent = [parameters(run, step) for step in STEPS]
    points = [ternarised(tree)[0] for tree in latent] if family else latent
    for i, row in enumerate(table.itertuples()):
        way = jax.tree.map(lambda b, a: b.astype(np.float64) - a, points[i + 1], points[i])
        distance = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(way)))
        assert row.effective_distance == pytest.approx(distance, rel=1e-5)
        assert row.loss == pytest.approx(loss(points[i]), rel=1e-5)
        h = 1e-4  # of the way
        slopes = [
            (loss(along(points[k], way, h)) - loss(along(points[k], way, -h))) / (2 * h * distance) for k in (i, i + 1)
        ]
        second = (slopes[1] - slopes[0]) / distance
        assert row.effective_first == pytest.approx(slopes[0], rel=1e-3, abs=1e-5)
        assert row.effective_second == pytest.approx(second, rel=1e-3, abs=1e-5)
        assert row.effective_curvature == pytest.approx(abs(second) / (1 + slopes[0] ** 2) ** 1.5, rel=2e-3)
        # It is the mean of the second derivative over the way: by Simpson's rule on second differences.
        bends = [
            (loss(along(points[i], way, t + 0.01)) - 2 * loss(along(points[i], way, t))
             + loss(along(points[i], way, t - 0.01))) / (0.01 * distance) ** 2 for t in np.linspace(0, 1, 9)
        ]
        simpson = np.dot(bends, [1, 4, 2, 4, 2, 4, 2, 4, 1]) / 24
        assert row.effective_second == pytest.approx(simpson, rel=0.02, abs=1e-4)
    if not family:
        for name in ("distance", "first", "second", "curvature"):
            assert list(table[f"latent_{name}"]) == list(table[f"effective_{name}"])
    else:
        assert (table["latent_distance"] != table["effective_distance"]).all()


def test_gradients_against_torch():
    """Norm, largest entry, the cosine of successive ones and the latent path's derivatives, from torch's gradients."""
    run = trained(*TERNARY)
    row = dynamics.landscape(run, batches=1).iloc[0]
    latent = [parameters(run, step) for step in STEPS[:2]]
    tokens = torch.tensor(Loader([(data(), 1.0)], split="train", T=16, B=8, V=304, seed=0).batch_at(0)).long()
    gradients = []
    for tree in latent:
        llama = llama_of(read_config(run).model, ternarised(tree)[0], torch.float64)
        logits = llama(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients.append({name: p.grad.numpy() for name, p in llama.named_parameters()})
    g, h = (np.concatenate([grad[name].ravel() for name in sorted(grad)]) for grad in gradients)
    states = [llama_of(read_config(run).model, tree, torch.float64).state_dict() for tree in latent]
    way = np.concatenate([(states[1][name] - states[0][name]).numpy().ravel() for name in sorted(gradients[0])])
    assert row["gradient_norm"] == pytest.approx(np.linalg.norm(g), rel=1e-4)
    assert row["gradient_max"] == pytest.approx(np.abs(g).max(), rel=1e-4)
    assert row["cosine"] == pytest.approx(g @ h / np.linalg.norm(g) / np.linalg.norm(h), abs=1e-4)
    distance = np.linalg.norm(way)
    assert row["latent_distance"] == pytest.approx(distance, rel=1e-5)
    assert row["latent_first"] == pytest.approx(g @ way / distance, rel=1e-3)
    assert row["latent_second"] == pytest.approx((h - g) @ way / distance**2, rel=1e-3)


def test_the_interventions_are_marked():
    assert dynamics.marks(trained(*TERNARY)) == {6: "peak lowered", 8: "decay removed"}
    assert dynamics.marks(trained()) == {}


def test_figures(tmp_path):
    run = trained(*TERNARY)
    figure = plots.dynamics(dynamics.updates(run), dynamics.landscape(run, batches=1), dynamics.marks(run),
                            tmp_path / "dynamics.png")
    assert (tmp_path / "dynamics.png").stat().st_size > 20_000
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert any("peak" in text for text in texts) and any("decay" in text for text in texts)


@pytest.mark.parametrize("function", [dynamics.updates, dynamics.landscape])
def test_one_checkpoint_is_not_enough(function):
    run = trained(*TERNARY, "checkpoint.permanent_tokens=0", "checkpoint.every_steps=12")
    with pytest.raises(UserError, match="holds one checkpoint, of step 12: .*--config.checkpoint.permanent_tokens=N"):
        function(run)


def test_no_batches():
    with pytest.raises(UserError, match="batches=0 to take gradients on; ask for at least 1"):
        dynamics.landscape(trained(*TERNARY), batches=0)
