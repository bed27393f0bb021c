"""Generated tokens against full forward passes and against transformers; batches, seeds, stops, compilations."""

import dataclasses
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import TERNARY, smollm2, trained
from transformers import AutoModelForCausalLM

import spectra_jax
from spectra_jax.errors import UserError
from spectra_jax.interop import hf
from spectra_jax.interop.importing import import_model
from spectra_jax.model.parameters import apply
from spectra_jax.schema import Mesh
from spectra_jax.serve import generate as module
from spectra_jax.serve.generate import Completion, Generator, rounded_up
from spectra_jax.serve.load import Loaded, load

PROMPTS = ["the whale said", "a", "of the ocean and the captain", "naïve"]


@pytest.fixture(scope="module")
def model(make) -> Generator:
    """A ternary model with a context of 64."""
    return Generator(make("ternary"))


def behind_the_best(model: Loaded, prompts: list[str], found: list[Completion]) -> np.ndarray:
    """By how much the logit of each generated token is below the largest, when all is run at once without a cache."""
    heads = [ids.tolist() for ids in model.tokenizer.encode_batch(prompts)]
    buffer = np.zeros((len(prompts), model.config.data.T), np.int32)
    for row, head, completion in zip(buffer, heads, found):
        row[: len(head) + len(completion.tokens)] = head + completion.tokens
    with jax.set_mesh(model.mesh):
        logits = np.asarray(jax.jit(lambda p, x: apply(model.graphdef, p)(x))(model.parameters, buffer))
    return np.concatenate([
        [row[n, : model.tokenizer.vocab_size].max() - row[n, token] for n, token in enumerate(c.tokens, len(head) - 1)]
        for row, head, c in zip(logits, heads, found)
    ])


def with_head(model: Loaded, head: jax.Array) -> Generator:
    """The same model with another matrix of logits."""
    return Generator(dataclasses.replace(model, parameters={**model.parameters, "head": head}))


@pytest.mark.parametrize("kind", ["float", "ternary", "bitnet158", "grid"])
def test_greedy_tokens_are_those_of_whole_forward_passes(make, kind):
    """Or as likely to the last digits; BitNet's rounding of activations makes more of those (test_cache.py)."""
    loaded = make(kind)
    found = Generator(loaded).generate(PROMPTS, max_new_tokens=12, temperature=0)
    behind = behind_the_best(loaded, PROMPTS, found)
    assert behind.shape == (48,) and behind.max() < (0.05 if kind == "bitnet158" else 1e-4)
    assert np.mean(behind == 0) > 0.9
    assert all(c.text == loaded.tokenizer.decode(c.tokens) and c.reason == "length" for c in found)
    assert len({tuple(c.tokens) for c in found}) == len(PROMPTS)


def test_transformers_writes_the_same(tmp_path):
    run = str(trained(*TERNARY))
    theirs, ours = AutoModelForCausalLM.from_pretrained(hf.export(run, tmp_path / "export")), spectra_jax.load(run)
    for prompt, found in zip(PROMPTS, ours.generate(PROMPTS, max_new_tokens=6, temperature=0)):
        ids = torch.tensor(ours.tokenizer.encode_batch([prompt])[0])[None].long()
        expected = theirs.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert found.tokens == expected[: len(found.tokens)] and len(found.tokens) >= 4


@pytest.mark.slow
def test_a_pretrained_model_writes_what_transformers_write(tmp_path):
    """SmolLM2-135M: thirty layers, three query heads to a key head, tied embeddings; a batch of unequal prompts."""
    run = str(import_model(smollm2(), tmp_path / "run"))
    theirs, ours = AutoModelForCausalLM.from_pretrained(hf.export(run, tmp_path / "export")), spectra_jax.load(run)
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time there was a naïve whale", "1, 2, 3,"]
    for prompt, found in zip(prompts, ours.generate(prompts, max_new_tokens=32, temperature=0)):
        ids = torch.tensor(ours.tokenizer.encode_batch([prompt])[0])[None].long()
        expected = theirs.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert found.tokens == expected


@pytest.mark.parametrize("mesh", [Mesh(1, 4, 2), Mesh(2, 4, 1)], ids=str)
def test_on_a_mesh(make, model, mesh):
    """Three rows and five of padding, or so."""
    options = {"max_new_tokens": 9, "temperature": 0.7, "top_k": 20}
    found = Generator(make("ternary", mesh=mesh)).generate(PROMPTS[:3], **options)
    assert found == model.generate(PROMPTS[:3], **options)


@pytest.mark.parametrize("options", [{"temperature": 1.0, "top_k": 0}, {"top_k": 30, "repetition_penalty": 1.2}])
def test_a_row_does_not_depend_on_the_others(model, monkeypatch, options):
    """Nor on its place, nor on how prompts are put into batches."""
    options = options | {"max_new_tokens": 12}
    together = model.generate(PROMPTS, seed=[5, 6, 7, 8], **options)
    assert [model.generate([p], seed=s, **options)[0] for s, p in zip((5, 6, 7, 8), PROMPTS)] == together
    assert model.generate(PROMPTS[::-1], seed=[8, 7, 6, 5], **options) == together[::-1]
    assert model.generate(PROMPTS, seed=5, **options) == together
    monkeypatch.setattr(module, "BATCH_SLOTS", 70)
    assert len(model._batches(PROMPTS, 12, (), 0)) == 2
    assert model.generate(PROMPTS, seed=5, **options) == together
    assert together != model.generate(PROMPTS, seed=6, **options)


def test_every_choice_is_a_new_one(make):
    """Where all tokens are equally likely, rows and steps differ."""
    loaded = make()
    even = with_head(loaded, 0.0 * loaded.parameters["head"])
    found = even.generate(["a"] * 4, max_new_tokens=20, temperature=1, top_k=0)
    drawn = [token for completion in found for token in completion.tokens]
    assert len(drawn) > 40 and len(set(drawn)) > 0.75 * len(drawn)


def test_penalised_tokens_come_less_often(model):
    """Those of the prompt too: with a penalty beyond all logits nothing is ever said twice."""
    prompt = list(range(1, 40))
    plain, other = (
        model.generate([prompt], max_new_tokens=20, temperature=0, repetition_penalty=penalty)[0].tokens
        for penalty in (1.0, 1e6)
    )
    assert len(set(prompt + plain)) < 59 and len(set(prompt + other)) == 39 + len(other)


def test_stop_strings(model):
    """The text ends before the first of them, in one piece or in many, and so do the tokens."""
    (plain,) = model.generate(PROMPTS[:1], max_new_tokens=20, temperature=0)
    stop = plain.text[5:9]
    options = {"max_new_tokens": 20, "temperature": 0, "stop": ["never written", stop]}
    (found,) = model.generate(PROMPTS[:1], **options)
    assert (found.text, found.reason) == (plain.text[: plain.text.index(stop)], "stop")
    assert found.tokens == plain.tokens[: len(found.tokens)] and stop in model.tokenizer.decode(found.tokens)
    assert stop not in model.tokenizer.decode(found.tokens[:-1])
    assert "".join(model.stream(PROMPTS[0], **options)) == found.text


def test_the_end_of_a_document(make):
    """All logits are 0 but that of the end, which is positive for one of two signs."""
    loaded = make()
    ends = jnp.arange(loaded.parameters["head"].shape[1])[None] == loaded.tokenizer.eod
    found = [
        with_head(loaded, jnp.where(ends, sign, 0.0 * loaded.parameters["head"])).generate(["a"], temperature=0)[0]
        for sign in (1.0, -1.0)
    ]
    assert Completion("", [], "end") in found and any(completion.tokens for completion in found)


def test_rows_that_pad_the_vocabulary_are_never_chosen(make, model):
    """Made by far the likeliest."""
    loaded = make("ternary")
    head = jnp.where(jnp.arange(304)[None] >= loaded.tokenizer.vocab_size, 1e3, loaded.parameters["head"])
    padded = with_head(loaded, head)
    for temperature in (0, 2.0):
        options = {"max_new_tokens": 8, "temperature": temperature}
        assert padded.generate(PROMPTS, **options) == model.generate(PROMPTS, **options)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "top_k": 0, "seed": 3}])
def test_a_stream_is_the_same_text_in_pieces(model, options):
    (whole,) = model.generate(PROMPTS[:1], max_new_tokens=40, **options)
    pieces = list(model.stream(PROMPTS[0], max_new_tokens=40, **options))
    assert "".join(pieces) == whole.text and len(pieces) > 2 and all(pieces)


def test_nothing_is_compiled_twice(make, caplog):
    """Other prompts of about the same lengths and any other options run the same programs."""
    model = Generator(make(L=1))

    def compilations(prompts: list[str], **options) -> int:
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            model.generate(prompts, **options)
        return sum(record.getMessage().startswith("Compiling") for record in caplog.records)

    assert compilations(PROMPTS[:2], max_new_tokens=9) >= 2
    for options in ({"temperature": 0}, {"temperature": 1}, {"top_k": 0, "top_p": 0.9}, {"min_p": 0.1, "seed": 4},
                    {"repetition_penalty": 1.5, "stop": ["x"]}, {"max_new_tokens": 12}):
        assert compilations(PROMPTS[1:3], **{"max_new_tokens": 9} | options) == 0
    assert compilations(PROMPTS[:2], max_new_tokens=20) >= 1  # a larger cache


def test_the_whole_context_can_be_read(make, model):
    """A prompt of exactly the context has one more token; it is not read."""
    ids = np.random.default_rng(0).integers(1, 295, 64).tolist()
    (found,) = model.generate([ids], max_new_tokens=1, temperature=0)
    loaded = make("ternary")
    with jax.set_mesh(loaded.mesh):
        logits = apply(loaded.graphdef, loaded.parameters)(jnp.asarray([ids], jnp.int32))[0, -1]
    assert found.tokens == [int(np.argmax(logits[: loaded.tokenizer.vocab_size]))]
    assert len(model.generate([ids[:4]], max_new_tokens=61, temperature=0)[0].tokens) == 61


def test_an_eight_bit_cache(make, model):
    """Writes much the same, and its logits are bounded in test_cache.py; here only that it is used."""
    small = Generator(make("ternary"), cache="int8")
    found, plain = (g.generate(PROMPTS, max_new_tokens=6, temperature=0) for g in (small, model))
    assert sum(a.tokens == b.tokens for a, b in zip(found, plain)) >= 2
    state, _ = small._prefill(small._batches(PROMPTS, 6, (), 0)[0], module.Sampling().checked())
    assert {x.dtype.name for x in jax.tree.leaves(state.cache.layers)} == {"int8", "float32"}


def test_speed(make, monkeypatch):
    model = Generator(make("ternary"))
    assert model.warm_up(PROMPTS, max_new_tokens=8) > 0 and str(model.speed) == "prefill no tokens; decode no tokens"
    model.generate(PROMPTS, max_new_tokens=8, temperature=0)
    prompts = sum(map(len, model.tokenizer.encode_batch(PROMPTS)))
    assert (model.speed.prefill_tokens, model.speed.decode_tokens) == (prompts, 4 * 7)
    monkeypatch.setattr(model, "_prefill", None)
    model.warm_up(PROMPTS[::-1], max_new_tokens=6)  # the same programs: nothing runs
    model.speed = module.Speed(10, 2.0, 3000, 2.0)
    assert str(model.speed) == "prefill 10 tokens, 5.0/s; decode 3,000 tokens, 1,500.0/s"


def test_weights_can_be_handed_over(make):
    """Then there is one copy of them at a time."""
    loaded, plain = make("grid"), Generator(make("grid"))
    taken = Generator(loaded, release=True)
    assert loaded.parameters["blocks"]["mlp"]["up"]["w"].codes.is_deleted()
    options = {"max_new_tokens": 4, "temperature": 0}
    assert taken.generate(PROMPTS, **options) == plain.generate(PROMPTS, **options)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([""], {}, "the prompt is empty; give at least one character"),
        ([[]], {}, "the prompt is empty"),
        ("the whale", {}, r"prompts and stop are lists; write \[text\] for one text"),
        (["a"], {"stop": "b"}, "prompts and stop are lists"),
        ([[1] * 3], {"max_new_tokens": 63}, "3 prompt tokens and 63 new ones exceed the context of 64; .* at most 62"),
        ([[1] * 65], {"max_new_tokens": 1}, "65 prompt tokens and 1 new ones .*; ask for at most 0 or shorten"),
        (["a"], {"max_new_tokens": 0}, "0 new tokens; ask for at least 1"),
        ([[1, 300]], {}, "the prompt has token ids from 1 to 300; they go from 0 to 294"),
        (["a", "b"], {"seed": [1]}, "1 seeds for 2 prompts; give one for each, or one number"),
        (["a"], {"temperature": -1.0}, "temperature=-1.0 must not be negative"),
    ],
)
def test_what_cannot_be_continued(model, prompts, options, message):
    with pytest.raises(UserError, match=message):
        model.generate(prompts, **{"max_new_tokens": 4} | options)


def test_unknown_caches_are_refused(make):
    with pytest.raises(UserError, match="cache='int4' is not one of auto, int8; did you mean int8?"):
        Generator(make(), cache="int4")


def test_no_prompts(model):
    assert model.generate([]) == []


@pytest.mark.parametrize(("n", "expected"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 96), (200, 256), (513, 768)])
def test_sizes(n, expected):
    assert rounded_up(n) == expected


def test_the_package_is_light_until_it_loads_a_model():
    code = "import spectra_jax, sys; assert not {'jax', 'numpy', 'flax'} & set(sys.modules); spectra_jax.load"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_latent_weights_are_frozen():
    run = str(trained(*TERNARY))
    options = {"max_new_tokens": 4, "temperature": 0}
    latent = Generator(load(run, latent=True, devices=jax.devices()[:1]))
    assert latent.generate(PROMPTS, **options) == spectra_jax.load(run).generate(PROMPTS, **options)
