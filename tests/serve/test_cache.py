"""Prompts and then a token at a time, against the whole text at once; attention against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.errors import UserError
from spectra_jax.model.parameters import apply
from spectra_jax.schema import Mesh
from spectra_jax.serve.cache import Bytes, attention, decode, prefill
from spectra_jax.serve.layers import by_layer
from spectra_jax.serve.load import Loaded

LENGTHS, PADDED, MORE = (1, 9, 12, 5), 12, 6


def whole(model: Loaded, texts: list[np.ndarray]) -> list[np.ndarray]:
    """Logits of texts, run at once by the code that trains, where what stands behind a text cannot be seen from it."""
    tokens = np.zeros((len(texts), PADDED + MORE), np.int32)
    for row, text in zip(tokens, texts):
        row[: len(text)] = text
    with jax.set_mesh(model.mesh):
        logits = np.asarray(jax.jit(lambda p, x: apply(model.graphdef, p)(x))(model.parameters, tokens))
    return [row[: len(text)] for row, text in zip(logits, texts)]


def cached(model: Loaded, texts: list[np.ndarray], stored: str = "auto") -> tuple[list[np.ndarray], int]:
    """Logits of every token of texts that are `MORE` longer than their prompts; bytes of the cache."""
    B = len(texts)
    tokens, lengths = np.zeros((B, PADDED), np.int32), np.array([len(text) - MORE for text in texts], np.int32)
    for b, text in enumerate(texts):
        tokens[b, : lengths[b]] = text[: lengths[b]]
    with jax.set_mesh(model.mesh):
        parameters = by_layer(model.config.model, model.parameters)

        @jax.jit
        def start(parameters, tokens, lengths):
            net = apply(model.graphdef, parameters)
            states, cache = prefill(net, tokens, lengths, PADDED + MORE, stored)
            return net.logits(states), cache

        @jax.jit
        def step(parameters, tokens, cache):
            net = apply(model.graphdef, parameters)
            states, cache = decode(net, tokens, cache)
            return net.logits(states)[:, 0], cache

        spread = [jax.device_put(x, jax.NamedSharding(model.mesh, jax.P(("slice", "data")))) for x in (tokens, lengths)]
        first, cache = start(parameters, *spread)
        found = [[*np.asarray(first)[b, :n]] for b, n in enumerate(lengths)]
        for i in range(MORE):
            logits, cache = step(parameters, jnp.asarray([text[i - MORE] for text in texts], jnp.int32), cache)
            for b, row in enumerate(np.asarray(logits)):
                found[b].append(row)
    return [np.array(rows) for rows in found], sum(x.nbytes for x in jax.tree.leaves(cache.layers))


def texts_of(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    """Prompts of these lengths, and more."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, 304, n + MORE) for n in lengths]


KINDS = {
    "float": {}, "ternary": {"scale_shards": 2}, "bitnet158": {}, "grid": {"K": 1}, "grid8": {"K": 4},
    "binary": {"tie_embeddings": True, "attention": "reference"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_logit_is_that_of_the_whole_text(make, kind):
    """Prompts of unequal lengths in one batch.

    Where activations are rounded to 8 bits, the order of a sum may carry one over a tie; what follows from it moves.
    """
    model = make(kind, **KINDS[kind])
    found, expected = (np.concatenate(rows) for rows in (cached(model, texts_of())[0], whole(model, texts_of())))
    assert found.shape == expected.shape and np.std(expected) > 0.5
    if kind in ("bitnet158", "grid8"):
        np.testing.assert_allclose(found, expected, atol=0.05)
        assert np.mean(np.all(np.abs(found - expected) < 1e-4, axis=1)) > 0.7
    else:
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_one_row_alone(make):
    """Its cache has no dim of rows."""
    model, texts = make("ternary"), texts_of((9,))
    np.testing.assert_allclose(cached(model, texts)[0][0], whole(model, texts)[0], atol=1e-4)


@pytest.mark.parametrize("mesh", [Mesh(1, 4, 1), Mesh(1, 2, 2), Mesh(2, 2, 2)], ids=str)
def test_on_a_mesh(make, mesh):
    """Rows over the data axes, heads over "model"."""
    found, _ = cached(make("ternary", mesh=mesh), texts_of())
    for logits, expected in zip(found, whole(make("ternary"), texts_of())):
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_low_precision(make):
    """In bfloat16 as near to float32 as the model itself is there."""
    model, exact = make(compute_dtype="bfloat16"), make()
    found, low, high = cached(model, texts_of())[0], whole(model, texts_of()), whole(exact, texts_of())
    bound = 2 * max(np.abs(a - b).max() for a, b in zip(low, high))
    assert 0.01 < bound < 0.5
    for logits, expected in zip(found, high):
        np.testing.assert_allclose(logits, expected, atol=bound)


def test_eight_bits(make):
    """A quarter of the bytes, and a scale for every H; logits off by under 2 % of their deviation, 10 % at most."""
    model = make()
    (found, small), (_, large) = (cached(model, texts_of(), stored) for stored in ("int8", "auto"))
    assert small == large * (1 + 4 / model.config.model.H) / 4
    errors = []
    for n, logits, expected in zip(LENGTHS, found, whole(model, texts_of())):
        np.testing.assert_allclose(logits[:n], expected[:n], atol=1e-4)  # prompts see exact keys and values
        errors.append((logits - expected)[n:] / np.std(expected))
    assert 1e-3 < np.sqrt(np.mean(np.square(errors))) < 0.02 and np.max(np.abs(errors)) < 0.1


def test_bytes_are_the_nearest():
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 8)).astype(np.float32)
    x[0, 0, 0] = 0.0
    stored = Bytes.of(jnp.asarray(x))
    assert stored.codes.dtype == jnp.int8 and stored.scales.shape == (2, 3, 5)
    error = np.abs(np.asarray(stored.codes) * np.asarray(stored.scales)[..., None] - x)
    assert np.all(error <= 0.501 * np.abs(x).max(-1, keepdims=True) / 127)


@pytest.mark.parametrize(("B", "N", "K"), [(1, 4, 2), (3, 4, 4), (2, 6, 1)])
def test_attention_against_float64(B, N, K):
    rng, C, H = np.random.default_rng(B), 11, 6
    q, keys, values = (2 * rng.standard_normal(s) for s in ((B, 1, N, H), (B, K, C, H), (B, K, C, H)))
    seen = rng.random((B, C)) < 0.5
    seen[:, 3] = True
    expected = np.zeros((B, 1, N, H))
    for b, n in np.ndindex(B, N):
        k, v = keys[b, n * K // N, seen[b]], values[b, n * K // N, seen[b]]
        share = np.exp(k @ q[b, 0, n] / np.sqrt(H))
        expected[b, 0, n] = share @ v / share.sum()
    keys, values = (jnp.asarray(x[0] if B == 1 else x, jnp.float32) for x in (keys, values))
    found = attention(jnp.asarray(q, jnp.float32), keys, values, jnp.asarray(seen))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("B", [1, 2])
def test_a_step_writes_in_place(make, B):
    """With a donated cache no step needs room for another one."""
    model, C = make(L=1), 4096
    with jax.set_mesh(model.mesh):
        net = lambda p: apply(model.graphdef, p)  # noqa: E731
        parameters = by_layer(model.config.model, model.parameters)
        like = jax.eval_shape(
            lambda p: prefill(net(p), jnp.zeros((B, 16), jnp.int32), jnp.ones(B, jnp.int32), C)[1], parameters
        )

        def steps(cache, parameters):
            run = lambda _, cache: decode(net(parameters), jnp.zeros(B, jnp.int32), cache)[1]  # noqa: E731
            return jax.lax.fori_loop(0, 4, run, cache)

        memory = jax.jit(steps, donate_argnums=0).lower(like, parameters).compile().memory_analysis()
    keys = like.layers[0][0]
    assert memory.alias_size_in_bytes >= 2 * keys.size * 4
    assert memory.temp_size_in_bytes < 0.5 * keys.size * 4


def test_prompts_that_do_not_fit(make):
    model = make()
    with pytest.raises(UserError, match="16 tokens of a prompt exceed the cache's 15 slots; use a larger cache"):
        prefill(apply(model.graphdef, model.parameters), jnp.zeros((1, 16), jnp.int32), jnp.ones(1, jnp.int32), 15)
