"""Parameters apart, layer by layer: the same matrices, dense or in forms with a product of their own."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.model.parameters import block_matrices, with_matrices
from spectra_jax.serve.generate import Generator
from spectra_jax.serve.layers import Dense, by_layer
from spectra_jax.weights.codebook import Codebook
from spectra_jax.weights.form import Form
from spectra_jax.weights.masked import Masked
from spectra_jax.weights.prepared import Prepared, prepare
from spectra_jax.weights.tables import Tables

RNG = np.random.default_rng(0)


def codebook(L: int, m: int, n: int) -> Codebook:
    codes = RNG.integers(0, 16, (L, m, n)).astype(np.uint8)
    return Codebook(jnp.asarray(codes), drawn(L, 2, n), drawn(L, 16))


def masked(L: int, m: int, n: int) -> Masked:
    return Masked(jnp.asarray(RNG.random((L, m, n)) < 0.1), drawn(L, m, n), codebook(L, m, n))


def tables(L: int, m: int, n: int) -> Tables:
    codes = RNG.integers(0, 4, (L, m, n)).astype(np.uint8)
    return Tables(jnp.asarray(codes), drawn(L, 4, m // 8, n), block=8)


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("kind", [codebook, masked, tables])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_becomes_its_matrix(make, kind, dtype):
    model = make(compute_dtype=dtype)
    m, parameters = model.config.model, model.parameters
    forms = {key: kind(*w.shape) for key, w in block_matrices(parameters).items()}
    found = by_layer(m, {**parameters, "blocks": with_matrices(parameters["blocks"], forms)})
    assert found["embedding"].dtype == found["head"].dtype == dtype
    for (module, name), whole in forms.items():
        layers = found["blocks"][module][name]["w"]
        assert len(layers) == m.L and all(type(w) is Dense and w.values.dtype == dtype for w in layers)
        for i, w in enumerate(layers):
            one: Form = jax.tree.map(lambda x: x[i], whole)
            np.testing.assert_allclose(
                w.dequantize().astype(np.float32), one.dequantize().astype(dtype).astype(np.float32), rtol=1e-6
            )


def test_what_is_no_matrix_stays_as_it_is(make):
    model = make("ternary", compute_dtype="bfloat16")
    found, blocks = by_layer(model.config.model, model.parameters), model.parameters["blocks"]
    for name in ("attention_norm", "mlp_norm"):
        gains = found["blocks"][name]["gain"]
        assert gains[0].dtype == jnp.float32
        np.testing.assert_array_equal(jnp.stack(gains), blocks[name]["gain"])
    assert found["norm"] is model.parameters["norm"]


def test_rounding_of_activations_stays(make):
    """As the form does it, without its arrays."""
    model = make("grid8")
    (w, _), x = by_layer(model.config.model, model.parameters)["blocks"]["mlp"]["up"]["w"], drawn(3, 32)
    whole = model.parameters["blocks"]["mlp"]["up"]["w"]
    np.testing.assert_array_equal(w.activation(x), whole.activation(x))
    assert not np.array_equal(w.activation(x), x) and not jax.tree.leaves(w.of)


def test_a_form_with_a_product_of_its_own_is_kept(make):
    model = make("ternary")
    with jax.set_mesh(model.mesh):
        packed = replace(model, parameters=prepare(model.parameters, "xla")[0])
    found = by_layer(model.config.model, packed.parameters)["blocks"]["attention"]["q"]["w"]
    assert [type(w) for w in found] == [Prepared, Prepared]
    options = {"max_new_tokens": 8, "temperature": 0}
    prompts = [[5, 6, 7], [8]]
    assert Generator(packed).generate(prompts, **options) == Generator(model).generate(prompts, **options)
