"""Attention by the kernels of GPUs without a GPU: numbers in an interpreter, programs as lowered for one."""

import contextlib
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.model.attention import causal_blocks, cudnn, flash, reference
from spectra_jax.model.attention_kernels import cudnn_kernel, flash_kernel

# With either of them JAX can trace for cuDNN; `pip install jax[cuda12]` brings it, whether or not there is a GPU.
CUDNN = any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def draw(T, N, K, H, dtype="float32", B=2):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, heads, H)), dtype) for heads in (N, K, K)]


def value_and_vjp(form, g, *arrays):
    value, back = jax.vjp(form, *arrays)
    return value, back(g)


def lowered(form, arrays):
    """The text of a forward and backward pass for an H200."""
    on_h200 = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):  # 0.10 takes one for granted
        device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
        on_h200 = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
    both = jax.grad(lambda *a: jnp.sum(form(*a).astype(jnp.float32)), (0, 1, 2))
    with on_h200:
        return jax.jit(both).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_flash():
    """In Pallas' interpreter, forward and backward, with grouped queries and a head that is no power of two."""
    q, k, v = draw(256, 4, 2, 80, B=1)
    g = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)
    expected, back = jax.vjp(lambda *a: reference(*a, 1), q, k, v)
    found, gradients = jax.jit(partial(value_and_vjp, partial(flash_kernel, interpret=True)))(g, q, k, v)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for one, other in zip(gradients, back(g)):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_flash_on_a_mesh():
    """Each device its own sequences and heads; the gradient too keeps its place."""
    q, k, v = draw(128, 2, 2, 64)
    expected = jax.grad(lambda *a: jnp.sum(reference(*a, 1) ** 2), (0, 1, 2))(q, k, v)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"))):
        spread = [jax.sharding.reshard(x, jax.P("data", None, "model", None)) for x in (q, k, v)]
        square = lambda *a: jnp.sum(flash_kernel(*a, interpret=True) ** 2)  # noqa: E731
        found = jax.jit(jax.grad(square, (0, 1, 2)))(*spread)
    for one, other in zip(found, expected):
        assert one.sharding.shard_shape(one.shape) == (1, 128, 1, 64)
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("form", [cudnn, flash])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_elsewhere_they_are_causal_blocks(form, dtype):
    q, k, v = draw(128, 4, 2, 16, dtype)
    found, expected = (jax.jit(partial(f, blocks=3))(q, k, v) for f in (form, causal_blocks))
    np.testing.assert_array_equal(found, expected)


def test_flash_lowers_for_gpus():
    name = "__gpu$xla.gpu.triton"
    assert lowered(partial(flash, blocks=2), draw(256, 4, 2, 64, "bfloat16")).count(name) == 3
    for T, H, dtype in ((256, 64, "float32"), (192, 64, "bfloat16"), (256, 136, "bfloat16")):
        assert name not in lowered(partial(flash, blocks=2), draw(T, 4, 2, H, dtype))


def test_where_cudnn_serves(monkeypatch):
    """By its name on a machine with GPUs; JAX refuses to trace it only where cuDNN is not installed."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    served = draw(130, 4, 2, 24, "bfloat16")
    if CUDNN:
        text = lowered(partial(cudnn, blocks=2), served)
        assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
        assert "CAUSAL" in text
    else:
        for form in (partial(cudnn, blocks=2), cudnn_kernel):
            with pytest.raises(RuntimeError, match="cuDNN is not detected"):
                jax.eval_shape(form, *served)
    for T, H, dtype in ((128, 64, "float32"), (128, 20, "bfloat16"), (128, 136, "bfloat16"), (64, 64, "bfloat16")):
        assert "cudnn" not in lowered(partial(cudnn, blocks=2), draw(T, 4, 2, H, dtype))
