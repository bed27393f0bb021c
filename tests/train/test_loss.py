"""Cross-entropy in chunks against PyTorch's in float64, on one device and with a sharded vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding

from spectra_jax.sharding import AXES, Rules
from spectra_jax.train.loss import mean_loss, token_losses

B, T, D, V = 8, 12, 16, 24


def inputs(std: float = 1.0):
    rng = np.random.RandomState(0)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    head = (std * rng.standard_normal((D, V))).astype(np.float32)
    return hidden, head, rng.randint(0, V, (B, T)).astype(np.int32)


def oracle(hidden, head, targets):
    """Losses (B, T), and the gradients of their mean, in float64."""
    x, w = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (hidden, head))
    logits = (x @ w).reshape(-1, V)
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(targets.reshape(-1)).long(), reduction="none")
    losses.mean().backward()
    return losses.detach().numpy().reshape(-1, T), x.grad.numpy(), w.grad.numpy()


@pytest.mark.parametrize("chunks", [1, 3, 12])
@pytest.mark.parametrize("std", [1.0, 1e3], ids=["usual", "logits of thousands"])
def test_value_and_gradients(chunks, std):
    hidden, head, targets = inputs(std)
    losses, d_hidden, d_head = oracle(hidden, head, targets)
    # The factor 3 checks that the gradients, formed in the forward pass, are scaled by the incoming one.
    ours, (dx, dw) = jax.jit(
        jax.value_and_grad(lambda x, w: 3.0 * mean_loss(x, w, jnp.asarray(targets), chunks), argnums=(0, 1))
    )(hidden, head)
    assert ours == pytest.approx(3 * losses.mean(), rel=1e-6)
    np.testing.assert_allclose(dx, 3 * d_hidden, rtol=1e-4, atol=3e-7 * abs(3 * d_hidden).max())
    np.testing.assert_allclose(dw, 3 * d_head, rtol=1e-4, atol=3e-6 * abs(3 * d_head).max())
    each = jax.jit(token_losses, static_argnums=3)(hidden, head, targets, chunks)
    assert each.dtype == jnp.float32
    np.testing.assert_allclose(each, losses, rtol=2e-6, atol=2e-6 * std)
    # Without a gradient another code path computes the same number.
    plain = jax.jit(mean_loss, static_argnums=3)(hidden, head, targets, chunks)
    assert plain == pytest.approx(losses.mean(), rel=1e-6)


def test_low_precision_hidden_states():
    hidden, head, targets = inputs()
    low = jnp.asarray(hidden, jnp.bfloat16)
    # The head is rounded too: the oracle gets the numbers that the product sees.
    losses, d_hidden, d_head = oracle(
        np.asarray(low, np.float32), np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32), targets
    )
    loss, (dx, dw) = jax.jit(
        jax.value_and_grad(lambda x, w: mean_loss(x, w, jnp.asarray(targets), 3), argnums=(0, 1))
    )(low, head)
    assert loss.dtype == jnp.float32 and loss == pytest.approx(losses.mean(), rel=1e-5)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(dx, np.float64), d_hidden, rtol=0.02, atol=0.01 * abs(d_hidden).max())
    np.testing.assert_allclose(dw, d_head, rtol=0.02, atol=0.01 * abs(d_head).max())


@pytest.mark.parametrize(("shape", "batch"), [((1, 4, 2), B), ((1, 1, 8), 1)], ids=["usual", "one sequence"])
def test_sharded_vocabulary(shape, batch):
    hidden, head, targets = inputs()
    hidden, targets = hidden[:batch], targets[:batch]
    losses, d_hidden, d_head = oracle(hidden, head, targets)
    rules = Rules()

    def both(x, w, y):
        loss, gradients = jax.value_and_grad(lambda x, w: mean_loss(x, w, y, 3, rules), argnums=(0, 1))(x, w)
        return loss, gradients, token_losses(x, w, y, 3, rules)

    mesh = jax.make_mesh(shape, AXES)
    with jax.set_mesh(mesh):
        specs = (rules("batch", "time", "act"), rules("embed", "vocab"), rules("batch", "time"))
        assert specs[1][1] == "model"
        arrays = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((hidden, head, targets), specs)]
        loss, (dx, dw), each = jax.jit(both)(*arrays)
        assert jax.typeof(dw).sharding.spec == specs[1] and jax.typeof(dx).sharding.spec[0] == specs[0][0]
    assert loss == pytest.approx(losses.mean(), rel=1e-6)
    np.testing.assert_allclose(each, losses, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(dx, d_hidden, rtol=1e-4, atol=3e-7 * abs(d_hidden).max())
    np.testing.assert_allclose(dw, d_head, rtol=1e-4, atol=3e-6 * abs(d_head).max())
