"""What training does to weights and to the loss around them, over the checkpoints that a run kept.

After Spectra's appendix F (camera-ready of arXiv 2407.12327), which follows MiniCPM's study of its schedule
(2404.06395, its definitions as recalled). Of a quantized model there are two paths: that of the latent weights, and
that of the effective ones (scale times code), which the loss depends on. The straight-through gradient is the gradient
at the effective weights, and there is one for both paths.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float, PyTree

from spectra_jax.analysis.runs import is_trained
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.model.matrices import Key
from spectra_jax.model.parameters import block_matrices, freeze, plain, with_matrices
from spectra_jax.schema import Config
from spectra_jax.serve.load import load
from spectra_jax.train.objective import batch_loss
from spectra_jax.train.schedule import interventions
from spectra_jax.train.workdir import read_config
from spectra_jax.weights import get_rule


class Point(NamedTuple):
    """A checkpoint on the host: both forms of its parameters, and the codes (none of a float model)."""

    step: int
    latent: PyTree
    effective: PyTree
    codes: dict[Key, np.ndarray]


def updates(run: str | Path) -> pd.DataFrame:
    """How far every block matrix moves from checkpoint to checkpoint; one row for each layer, kind and step.

    Columns: step, tokens (of the later checkpoint), steps (since the earlier), layer, kind; latent_max, latent_mean,
    effective_max, effective_mean (of the magnitudes of changes); flips (share of codes that differ).

    Raises:
      UserError: a run that was made and not trained, that trains no matrix, or without at least two checkpoints.
    """
    config, rows = read_config(run), []
    points = _points(run)
    before = next(points)
    for now in points:
        for key in block_matrices(now.latent):
            for layer in range(config.model.L):
                row: dict[str, Any] = {
                    "step": now.step, "tokens": now.step * config.tokens_per_step, "steps": now.step - before.step,
                    "layer": layer, "kind": ".".join(key),
                }
                for name in ("latent", "effective"):
                    trees = (plain(config.model, getattr(point, name)) for point in (now, before))
                    a, b = (block_matrices(tree)[key][layer] for tree in trees)
                    change = np.abs(a.astype(np.float64) - b)
                    row |= {f"{name}_max": change.max(), f"{name}_mean": change.mean()}
                if key in now.codes:
                    row["flips"] = float(np.mean(now.codes[key][layer] != before.codes[key][layer]))
                rows.append(row)
        before = now
    return pd.DataFrame(rows)


def landscape(run: str | Path, *, batches: int = 4) -> pd.DataFrame:
    """The loss around every checkpoint and along the way to the next, on the run's first training batches.

    With u the unit vector towards the next checkpoint, at distance d, g the gradient here and h the one there, over all
    parameters, one row for each checkpoint but the last:

      step, tokens, loss;  gradient_norm, gradient_max;  cosine: of g and h
      latent_distance, latent_first = g.u, latent_second = (h - g).u / d, and
      latent_curvature = |second| / (1 + first^2)^(3/2), of the curve that the loss is along u
      effective_...: the same along the effective weights

    `second` is the mean of the second directional derivative between the two checkpoints.

    Raises:
      UserError: a run that was made and not trained, or without at least two checkpoints; data that is not there.
    """
    config, rows = read_config(run), []
    tokens, before = None, None
    for point, graphdef in _points(run, with_graph=True):
        if tokens is None:
            tokens = _batches(config, batches)
            gradient = jax.jit(jax.value_and_grad(partial(batch_loss, graphdef, chunks=config.train.loss_chunks)))
        loss, g = _mean_gradient(gradient, point.latent, tokens)
        if before is not None:
            rows.append(_row(config, *before, point, g))
        before = point, loss, g
    return pd.DataFrame(rows)


def marks(run: str | Path) -> dict[int, str]:
    """The steps at which the run's schedule changes abruptly, with what happens."""
    return interventions(read_config(run))


def _points(run: str | Path, with_graph: bool = False) -> Iterator[Any]:
    """The checkpoints that a run kept for good, or else all, earliest first, on the host."""
    config = read_config(run)
    if not is_trained(run):
        raise UserError(f"{run} is a {config.family} that was made and not trained: it has one state and no latent "
                        "weights; name the run that it was made of")
    if not get_rule(config.model.weight).holds_matrix:
        raise UserError(f"{run} is trained under {config.model.weight}, by factors and scales in the place of weights: "
                        "there is no matrix whose way could be followed")
    checkpoints = Checkpoints(run)
    steps, kept = checkpoints.chosen(None), set(config.permanent_steps)
    checkpoints.close()
    if len(kept.intersection(steps)) > 1:  # those to resume from stand at other distances
        steps = [step for step in steps if step in kept]
    if len(steps) < 2:
        raise UserError(f"{run} holds one checkpoint, of step {steps[0]}: what moves shows between two; train with "
                        "--config.checkpoint.permanent_tokens=N to keep one for every N tokens")
    for step in steps:
        model = load(f"{run}@{step}", latent=True, devices=jax.devices()[:1])
        m = model.config.model
        effective, codes = model.parameters, {}
        if get_rule(m.weight).quantized:
            with jax.set_mesh(model.mesh):
                frozen = block_matrices(freeze(m, model.parameters))
                # A map of what is zero is no code.
                codes = {key: np.asarray(w.core.codes) for key, w in frozen.items() if hasattr(w.core, "codes")}
                dense = {key: jax.vmap(lambda one: one.dequantize())(w) for key, w in frozen.items()}
                latent, put = block_matrices(model.parameters), get_rule(m.weight).with_matrix
                dense = {key: put(latent[key], w) for key, w in dense.items()}
            effective = {**effective, "blocks": with_matrices(effective["blocks"], dense)}
        point = Point(step, *(jax.tree.map(np.asarray, tree) for tree in (model.parameters, effective)), codes)
        yield (point, model.graphdef) if with_graph else point


def _batches(config: Config, count: int) -> list[np.ndarray]:
    if count < 1:
        raise UserError(f"batches={count} to take gradients on; ask for at least 1")
    loader = Loader(
        config.mixture, split="train", T=config.data.T, B=config.data.batch, V=config.model.V, seed=config.seed
    )
    return [loader.batch_at(step) for step in range(count)]


def _mean_gradient(gradient: Any, parameters: PyTree, batches: list[np.ndarray]) -> tuple[float, PyTree]:
    """Loss and gradient over all batches, in float64 on the host."""
    losses, total = [], None
    for tokens in batches:
        loss, g = gradient(parameters, tokens)
        losses.append(float(loss))
        g = jax.tree.map(lambda x: np.asarray(x, np.float64) / len(batches), g)
        total = g if total is None else jax.tree.map(np.add, total, g)
    return float(np.mean(losses)), total


def _row(config: Config, point: Point, loss: float, g: PyTree, after: Point, h: PyTree) -> dict[str, Any]:
    """One row of `landscape`."""
    g, h = _flat(g), _flat(h)
    row = {
        "step": point.step, "tokens": point.step * config.tokens_per_step, "loss": loss,
        "gradient_norm": np.linalg.norm(g), "gradient_max": np.abs(g).max(),
        "cosine": g @ h / (np.linalg.norm(g) * np.linalg.norm(h)),
    }
    for name in ("latent", "effective"):
        way = _flat(getattr(after, name)) - _flat(getattr(point, name))
        distance = np.linalg.norm(way)
        first, second = g @ way / distance, (h - g) @ way / distance**2
        row |= {
            f"{name}_distance": distance, f"{name}_first": first, f"{name}_second": second,
            f"{name}_curvature": abs(second) / (1 + first**2) ** 1.5,
        }
    return row


def _flat(tree: PyTree) -> Float[np.ndarray, "P"]:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
