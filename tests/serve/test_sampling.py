"""Filters against the logits processors of transformers; draws against the probabilities that those leave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as processors

from spectra_jax.errors import UserError
from spectra_jax.serve.sampling import FEW, Sampling, draw, filtered, penalised

B, V = 5, 400
SETTINGS = [
    {"temperature": 0.7, "top_k": 0}, {"temperature": 1.3, "top_k": 1}, {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": FEW}, {"temperature": 1.0, "top_k": FEW + 20},
    {"temperature": 1.0, "top_k": V + 100}, {"temperature": 0.9, "top_k": 0, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 0, "top_p": 0.01}, {"temperature": 1.0, "top_k": 0, "min_p": 0.1},
    {"temperature": 0.6, "top_k": 0, "min_p": 1.0}, {"temperature": 1.5, "top_k": 12, "top_p": 0.6},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.2}, {"temperature": 1.1, "top_k": 200, "top_p": 0.7},
]


def logits_of(seed: int = 0, rows: int = B) -> np.ndarray:
    """As spread as those of a language model."""
    return 3 * np.random.default_rng(seed).standard_normal((rows, V)).astype(np.float32)


def theirs(logits: np.ndarray, temperature: float, top_k: int, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Probabilities after the warpers in the order in which `generate` of transformers has them."""
    warpers = processors.LogitsProcessorList([processors.TemperatureLogitsWarper(temperature)])
    warpers += [processors.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [processors.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [processors.MinPLogitsWarper(min_p)] if min_p else []
    return torch.softmax(warpers(torch.zeros(len(logits), 1, dtype=torch.long), torch.tensor(logits)), -1).numpy()


@functools.partial(jax.jit, static_argnames="vocabulary")
def drawn(logits, seen, keys, how, vocabulary=V):
    """As decoding calls it."""
    return draw(logits, seen, keys, how, vocabulary)


def keys_of(seeds) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters(settings):
    how, logits = Sampling(**settings).checked(), logits_of()
    expected = theirs(logits, **settings)
    for candidates in {V, FEW} if 0 < settings["top_k"] <= FEW else {V}:
        values, ids = filtered(jnp.asarray(logits), how, candidates)
        found = np.zeros((B, V), np.float32)
        np.put_along_axis(found, np.asarray(ids), np.asarray(jax.nn.softmax(values, -1)), axis=1)
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_repetition_penalty(penalty):
    logits, rng = logits_of(1), np.random.default_rng(2)
    ids = rng.integers(0, V, (B, 30))
    seen = np.zeros((B, V), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(logits)).numpy()
    np.testing.assert_allclose(penalised(jnp.asarray(logits), jnp.asarray(seen), penalty), expected, rtol=1e-6)
    assert (penalty == 1) == np.array_equal(logits, expected)


@pytest.mark.parametrize("settings", [SETTINGS[i] for i in (0, 2, 8, 10, 12)], ids=str)
def test_frequencies(settings):
    """Of 20,000 draws with different seeds, in standard deviations of their count."""
    n, row = 20_000, logits_of(3, 1)
    tokens = drawn(np.repeat(row, n, 0), np.zeros((n, V), bool), keys_of(range(n)), Sampling(**settings).checked())
    p = theirs(row, **settings)[0].astype(np.float64)
    count = np.bincount(np.asarray(tokens), minlength=V)
    assert np.all(count[p == 0] == 0)
    assert np.all(np.abs(count - n * p) < 5 * np.sqrt(n * p * (1 - p)) + 3)


def test_greedy():
    """The likeliest, whatever the filters; the penalty counts."""
    logits, none = logits_of(4), np.zeros((B, V), bool)
    how = Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.5).checked()
    np.testing.assert_array_equal(drawn(logits, none, keys_of(range(B)), how), logits.argmax(1))
    seen = none.copy()
    np.put_along_axis(seen, logits.argmax(1)[:, None], True, axis=1)
    how = Sampling(temperature=0, repetition_penalty=100).checked()
    np.testing.assert_array_equal(drawn(logits, seen, keys_of(range(B)), how), np.argsort(logits, 1)[:, -2])


@pytest.mark.parametrize("settings", [{"temperature": 0}, *SETTINGS[:7]], ids=str)
def test_rows_of_the_embedding_without_a_token(settings):
    """By far the likeliest, and never taken; nor by a wide enough choice."""
    logits = logits_of(5)
    logits[:, 300:] += 1e3
    found = drawn(logits, np.zeros((B, V), bool), keys_of(range(B)), Sampling(**settings).checked(), vocabulary=300)
    assert np.all(np.asarray(found) < 300)


@pytest.mark.parametrize("settings", [SETTINGS[i] for i in (0, 2, 12)], ids=str)
def test_a_row_s_choice_is_its_own(settings):
    """It follows from its key and its logits, not from its place and not from its company."""
    how, logits, none = Sampling(**settings).checked(), logits_of(6), np.zeros((B, V), bool)
    together = drawn(logits, none, keys_of(range(B)), how)
    order = np.array([3, 1, 4, 0, 2])
    np.testing.assert_array_equal(drawn(logits[order], none, keys_of(order), how), np.asarray(together)[order])
    for b in range(B):
        assert drawn(logits[b : b + 1], none[:1], keys_of([b]), how)[0] == together[b]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must not be negative; 0 takes the likeliest token"),
        ({"temperature": float("nan")}, "temperature=nan must not be negative"),
        ({"top_k": -1}, "top_k=-1 must be a whole number that is not negative; 0 chooses among all"),
        ({"top_p": 0}, "top_p=0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"min_p": 2}, "min_p=2 must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be above 0; 1 changes nothing"),
    ],
)
def test_numbers_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings).checked()
