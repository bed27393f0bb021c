"""Products of matrices in parts on a mesh, forward and gradient, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels.parallel import shard, sharded_matmul

# (cut, scales): a scale for all, for as many shards as parts, for fewer, for more, and for every output.
CASES = {
    "outputs, one": (1, (1, 1)), "outputs, shards": (1, (1, 4)), "outputs, fewer": (1, (1, 2)),
    "per output": (1, (1, 96)), "inputs, one": (0, (1, 1)), "inputs, shards": (0, (4, 1)),
    "inputs, more": (0, (8, 1)), "inputs, per output": (0, (1, 96)),
}


def a_mesh(kind=AxisType.Explicit):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def drawn(scales, m=64, n=96):
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, (m, n)).astype(np.int8)
    s = rng.uniform(0.5, 2, scales).astype(np.float32)
    matrix = codes * np.repeat(np.repeat(s.astype(np.float64), m // scales[0], 0), n // scales[1], 1)
    x, g = (rng.standard_normal((6, k)).astype(np.float32) for k in (m, n))
    return jnp.asarray(codes), jnp.asarray(s), matrix, x, g


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize(("cut", "scales"), CASES.values(), ids=CASES)
def test_product_and_gradient(cut, scales, implementation):
    codes, s, matrix, x, g = drawn(scales)

    @jax.jit
    def run(x, g, codes, s):
        weights = shard(codes, s, cut, "model", implementation)
        assert weights.data.shape[0] == 4 and (weights.m, weights.n) == ((16, 96) if cut == 0 else (64, 24))
        y, back = jax.vjp(lambda x: sharded_matmul(x, weights, cut, "model", implementation, rows="data"), x)
        return y, back(jax.sharding.reshard(g, jax.typeof(y).sharding.spec))[0], weights.data

    with jax.set_mesh(a_mesh()):
        y, dx, data = run(x, g, codes, s)
    assert data.addressable_shards[0].data.shape == (1, *data.shape[1:])
    bound = np.abs(x).max(-1, keepdims=True) * 2**-14.9 * np.abs(matrix).sum(0) + 1e-4  # of two digits
    assert np.all(np.abs(y - x @ matrix) <= bound)
    np.testing.assert_allclose(dx, g @ matrix.T, rtol=1e-5, atol=1e-4)


def test_a_mesh_of_automatic_axes():
    codes, s, matrix, x, _ = drawn((1, 4))
    with jax.set_mesh(a_mesh(AxisType.Auto)):
        y = jax.jit(lambda x: sharded_matmul(x, shard(codes, s, 1, "model", "xla"), 1, "model", "xla"))(x)
    np.testing.assert_allclose(y, x @ matrix, rtol=1e-3, atol=5e-3)


def test_layers_of_a_stack():
    codes, s, matrix, x, _ = drawn((4, 1))
    with jax.set_mesh(a_mesh()):
        stack = jax.jit(lambda: shard(jnp.stack([codes, -codes]), jnp.stack([s, s]), 0, "model", "cpu"))()
        for i, sign in enumerate((1, -1)):
            layer = jax.tree.map(lambda a: a[i], stack)
            y = jax.jit(lambda x, w: sharded_matmul(x, w, 0, "model", "cpu"))(x, layer)
            np.testing.assert_allclose(y, sign * x @ matrix, rtol=1e-3, atol=5e-3)


def test_misfits_are_refused():
    codes, s, *_ = drawn((1, 1))
    with jax.set_mesh(a_mesh()):
        with pytest.raises(ValueError, match="66 inputs do not divide into 4 parts"):
            shard(jnp.ones((66, 96), jnp.int8), s, 0, "model", "xla")
        with pytest.raises(ValueError, match="6 scales along the outputs do not divide into 4"):
            shard(codes, jnp.ones((1, 6)), 1, "model", "xla")
