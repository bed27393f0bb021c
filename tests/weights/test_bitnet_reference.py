"""BitNet b1.58 against a public implementation: the online linear layer of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.integrations.bitnet import ActQuant, AutoBitLinear, WeightQuant

from spectra_jax.weights import get_rule
from spectra_jax.weights.bitnet158 import quantize_tokens
from spectra_jax.weights.frozen import matmul
from spectra_jax.weights.rule import Shards

RULE, SHARDS = get_rule("bitnet158"), Shards()
M, N, TOKENS = 64, 48, 12


@pytest.fixture(autouse=True)
def eager():
    """The reference asks torch to compile its functions; their values are the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def effective(w):
    return RULE.effective(w, RULE.statistics([w], SHARDS), SHARDS)


@pytest.mark.parametrize("magnitude", [1.0, 0.02, 1e-7])
def test_weights(rng, magnitude):
    w = (magnitude * rng.standard_normal((M, N))).astype(np.float32)
    latent = torch.tensor(w.T, requires_grad=True)
    expected = WeightQuant.apply(latent)
    cotangent = rng.standard_normal((M, N)).astype(np.float32)
    expected.backward(torch.tensor(cotangent.T))
    found, back = jax.vjp(effective, jnp.asarray(w))
    np.testing.assert_allclose(found, expected.detach().numpy().T, rtol=1e-6)
    np.testing.assert_array_equal(back(jnp.asarray(cotangent))[0], latent.grad.numpy().T)


@pytest.mark.parametrize("magnitude", [1.0, 1e-7])
def test_activations(rng, magnitude):
    x = (magnitude * rng.standard_normal((TOKENS, M))).astype(np.float32)
    inputs = torch.tensor(x, requires_grad=True)
    expected = ActQuant.apply(inputs)
    cotangent = rng.standard_normal((TOKENS, M)).astype(np.float32)
    expected.backward(torch.tensor(cotangent))
    found, back = jax.vjp(lambda x: quantize_tokens(x, RULE.eps), jnp.asarray(x))
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(back(jnp.asarray(cotangent))[0], inputs.grad.numpy())


def test_linear_layer_with_its_norm(rng):
    """Output and both gradients of the whole layer."""
    w = (0.02 * rng.standard_normal((M, N))).astype(np.float32)
    x = (2 * rng.standard_normal((TOKENS, M))).astype(np.float32)
    target = rng.standard_normal((TOKENS, N)).astype(np.float32)
    layer = AutoBitLinear(M, N, bias=False, online_quant=True, use_rms_norm=True)
    layer.weight.data = torch.tensor(w.T)
    inputs = torch.tensor(x, requires_grad=True)
    expected = (torch.tanh(layer(inputs)) ** 2 * torch.tensor(target)).sum()
    expected.backward()

    def loss(w, x):
        y = matmul(RULE.activation(x), effective(w))
        return jnp.sum(jnp.tanh(y) ** 2 * target)

    value, (dw, dx) = jax.value_and_grad(loss, (0, 1))(jnp.asarray(w), jnp.asarray(x))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for found, reference in ((dw, layer.weight.grad.numpy().T), (dx, inputs.grad.numpy())):
        np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())
