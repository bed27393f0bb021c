"""AdamW against PyTorch's, and against float64 numpy with rates and decays that change from step to step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import drawn, tiny

from spectra_jax.model.parameters import init_parameters
from spectra_jax.schema import Optimizer
from spectra_jax.train.optimizer import apply_updates, decay_mask, make_optimizer

SHAPES = {"a": (5, 7), "b": {"gain": (11,), "w": (2, 3, 4)}}


def draw(seed: int, scale: float) -> dict:
    """A tree like SHAPES."""
    rng = np.random.RandomState(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.standard_normal(shape)).astype(np.float32), SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


# The first is clipped (norm about 8), the second is not (0.8), the fourth is zero.
GRADIENTS = [draw(seed, scale) for seed, scale in enumerate([1.0, 0.1, 3.0, 0.0, 0.02], 1)]


def ours(o: Optimizer, rates: list[float], decays: list[float]) -> dict:
    """The parameters after these steps."""
    optimizer, parameters = make_optimizer(o), jax.tree.map(jnp.asarray, draw(0, 1.0))
    state, mask = optimizer.init(parameters), decay_mask(o, parameters)
    for gradient, rate, decay in zip(GRADIENTS, rates, decays):
        direction, state = optimizer.update(gradient, state, parameters)
        parameters = apply_updates(parameters, direction, mask, jnp.asarray(rate), jnp.asarray(decay))
    return parameters


def test_five_steps_of_pytorch():
    o = Optimizer(no_decay=())
    parameters = [torch.nn.Parameter(torch.tensor(p)) for p in jax.tree.leaves(draw(0, 1.0))]
    peer = torch.optim.AdamW(parameters, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for gradient in GRADIENTS:
        for p, g in zip(parameters, jax.tree.leaves(gradient)):
            p.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        peer.step()
    for a, b in zip(jax.tree.leaves(ours(o, [0.02] * 5, [0.1] * 5)), parameters, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("no_decay", [("gain",), ("gain", "a"), ()])
def test_changing_rates_and_decays(no_decay):
    """Algorithm 2 of arXiv 1711.05101 in float64: the decay is multiplied by the rate, not by the gradient's scale."""
    o = Optimizer(b1=0.8, b2=0.97, eps=1e-6, clip=0.5, no_decay=no_decay)
    rates, decays = [0.01, 0.03, 0.02, 0.04, 0.005], [0.1, 0.1, 0.3, 0.0, 0.2]
    names = ["a", "b.gain", "b.w"]
    theta = [p.astype(np.float64) for p in jax.tree.leaves(draw(0, 1.0))]
    m, v = [0.0 * p for p in theta], [0.0 * p for p in theta]
    for k, (gradient, rate, decay) in enumerate(zip(GRADIENTS, rates, decays), 1):
        gs = [g.astype(np.float64) for g in jax.tree.leaves(gradient)]
        norm = np.sqrt(sum((g**2).sum() for g in gs))
        for i, g in enumerate(gs):
            g = g * min(1.0, 0.5 / norm) if norm else g
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.97 * v[i] + 0.03 * g**2
            update = m[i] / (1 - 0.8**k) / (np.sqrt(v[i] / (1 - 0.97**k)) + 1e-6)
            decayed = not any(part in names[i] for part in no_decay)
            theta[i] = theta[i] - rate * update - rate * decay * decayed * theta[i]
    for a, b in zip(jax.tree.leaves(ours(o, rates, decays)), theta, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def undecayed(o: Optimizer, tree: dict) -> set[str]:
    """The names of the parameters that are not decayed."""
    leaves = jax.tree_util.tree_leaves_with_path(decay_mask(o, tree))
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, decayed in leaves if not decayed}


def test_the_mask_goes_by_name():
    def parameters(weight):
        m = tiny(f"model.weight={weight}").model
        return drawn(jax.eval_shape(lambda key: init_parameters(m, key), jax.random.key(0)))

    block_norms = {"blocks.attention_norm.gain", "blocks.mlp_norm.gain"}
    assert undecayed(Optimizer(), parameters("ternary")) == block_norms | {"norm.gain"}
    assert undecayed(Optimizer(), parameters("bitnet158")) == {"norm.gain"}  # its linear layers normalise without gain
    assert undecayed(Optimizer(no_decay=()), parameters("float")) == set()
    assert undecayed(Optimizer(no_decay=("embedding", "mlp.down")), parameters("float")) == {
        "embedding", "blocks.mlp.down.w"
    }
