"""Completions against the likeliest tokens of full forward passes; choices by seed, among the top k."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TERNARY, spectra, trained

from spectra_jax.errors import UserError
from spectra_jax.model.parameters import apply
from spectra_jax.serve.generate import complete
from spectra_jax.serve.load import Loaded, load

PROMPT = "the whale said"


@pytest.fixture(scope="module")
def model() -> Loaded:
    """A trained model on one device."""
    return load(str(trained(*TERNARY)), devices=jax.devices()[:1])


def logits(model: Loaded, ids: list[int]) -> np.ndarray:
    """Those of the next token, without padding on either axis."""
    with jax.set_mesh(model.mesh):
        full = jax.jit(lambda p, x: apply(model.graphdef, p)(x))(model.parameters, jnp.asarray([ids], jnp.int32))
    return np.asarray(full)[0, -1, : model.tokenizer.vocab_size]


def continuation(model: Loaded, text: str) -> list[int]:
    """The ids that were added to the prompt (of tokens that survive the way through text)."""
    ids = model.tokenizer.encode_batch([text])[0].tolist()
    prompt = model.tokenizer.encode_batch([PROMPT])[0].tolist()
    return ids[len(prompt) :]


def with_head(model: Loaded, head: jax.Array) -> Loaded:
    """The same model with another matrix of logits."""
    return dataclasses.replace(model, parameters={**model.parameters, "head": head})


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 5.0, "top_k": 1}])
def test_greedy_is_the_argmax_at_every_step(model, options):
    ids = model.tokenizer.encode_batch([PROMPT])[0].tolist()
    start = len(ids)
    for _ in range(4):
        ids.append(int(np.argmax(logits(model, ids))))
    assert model.tokenizer.eod not in ids
    expected = PROMPT + model.tokenizer.decode(np.array(ids[start:]))
    assert complete(model, PROMPT, new_tokens=4, **options) == expected


def test_choices_follow_the_seed(model):
    texts = [complete(model, PROMPT, new_tokens=6, temperature=3.0, top_k=0, seed=seed) for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1] and len(set(texts)) > 2
    assert all(text.startswith(PROMPT) for text in texts)


def test_top_k(model):
    """At a temperature that makes all choices equal, only the k likeliest are ever taken."""
    first = np.argsort(-logits(model, model.tokenizer.encode_batch([PROMPT])[0].tolist()))[:3]
    allowed = {PROMPT + model.tokenizer.decode(np.array([token])) for token in first}
    seen = {complete(model, PROMPT, new_tokens=1, temperature=1e4, top_k=3, seed=seed) for seed in range(20)}
    assert seen == allowed


def test_temperature(model):
    """The frequencies of the first token are softmax(logits / temperature)."""
    z = logits(model, model.tokenizer.encode_batch([PROMPT])[0].tolist()).astype(np.float64) / 0.5
    likeliest = PROMPT + model.tokenizer.decode(np.array([int(np.argmax(z))]))
    p = 1 / np.exp(z - z.max()).sum()
    n = 200
    seen = sum(complete(model, PROMPT, new_tokens=1, temperature=0.5, top_k=0, seed=s) == likeliest for s in range(n))
    assert abs(seen / n - p) < 4 * (p * (1 - p) / n) ** 0.5 + 0.01


def test_rows_without_a_token_are_never_chosen(model):
    """Rows that pad the vocabulary, made by far the likeliest."""
    rows, known = model.parameters["head"].shape[1], model.tokenizer.vocab_size
    assert rows > known
    padded = with_head(model, jnp.where(jnp.arange(rows)[None] >= known, 1e3, model.parameters["head"]))
    plain = complete(model, PROMPT, new_tokens=4, temperature=0.0)
    assert complete(padded, PROMPT, new_tokens=4, temperature=0.0) == plain


def test_the_end_of_a_document_ends_it(model):
    """All logits are 0 but that of the end, which is positive for one of two signs."""
    ends = jnp.arange(model.parameters["head"].shape[1])[None] == model.tokenizer.eod
    ended = 0
    for sign in (1.0, -1.0):
        last = with_head(model, jnp.where(ends, sign, 0.0 * model.parameters["head"]))
        ended += complete(last, PROMPT, new_tokens=6, temperature=0.0) == PROMPT
    assert ended == 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty; give at least one character"),
        (PROMPT, {"new_tokens": 16}, r"\d prompt tokens and 16 new ones exceed the context of 16; ask for at most \d+"),
        (PROMPT * 9, {"new_tokens": 1}, "exceed the context of 16; ask for at most 0 or shorten the prompt"),
        (PROMPT, {"new_tokens": 0}, "0 new tokens"),
        (PROMPT, {"temperature": -1.0}, "temperature=-1.0 and top_k=40 must not be negative"),
        (PROMPT, {"top_k": -1}, "top_k=-1 must not be negative"),
    ],
)
def test_what_cannot_be_completed(model, prompt, options, message):
    with pytest.raises(UserError, match=message):
        complete(model, prompt, **{"new_tokens": 4} | options)


def test_the_whole_context_can_be_filled(model):
    room = 16 - len(model.tokenizer.encode_batch([PROMPT])[0])
    assert len(complete(model, PROMPT, new_tokens=room, top_k=400)) > len(PROMPT)


def test_the_command():
    command = [f"--checkpoint={trained(*TERNARY)}", f"--prompt={PROMPT}", "--tokens=4", "--temperature=0"]
    done = spectra(*command, module="spectra_jax.generate")
    assert done.returncode == 0, done.stderr
    model = load(str(trained(*TERNARY)), devices=jax.devices()[:1])
    assert done.stdout == complete(model, PROMPT, new_tokens=4, temperature=0.0) + "\n"
