"""A recurrent mixer a token at a time, against the whole text at once; exports that refuse it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import trained
from test_cache import LENGTHS, MORE, PADDED, texts_of, whole

from spectra_jax.errors import UserError
from spectra_jax.interop import gguf_export, hf
from spectra_jax.model.parameters import apply
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.schema import Config, Mesh, Quantize
from spectra_jax.serve.generate import Generator
from spectra_jax.serve.layers import by_layer
from spectra_jax.serve.load import load
from spectra_jax.serve.recurrent import decode, prefill

MIXER = {"mixer": "mlgru", "K": 4}
RUN = ("model.mixer=mlgru", "model.K=4", "model.weight=bitlinear", "model.quantized_head=True")


def kept(model, texts):
    """Logits of every token of texts that are `MORE` longer than their prompts, and bytes of the last state."""
    lengths = np.array([len(text) - MORE for text in texts], np.int32)
    tokens = np.zeros((len(texts), PADDED), np.int32)
    for b, text in enumerate(texts):
        tokens[b, : lengths[b]] = text[: lengths[b]]
        tokens[b, lengths[b] :] = 7  # padding that would show
    with jax.set_mesh(model.mesh):
        parameters = by_layer(model.config.model, model.parameters)

        @jax.jit
        def start(parameters, tokens, lengths):
            net = apply(model.graphdef, parameters)
            states, state = prefill(net, tokens, lengths, 0)
            return net.logits(states), state

        @jax.jit
        def step(parameters, tokens, state):
            net = apply(model.graphdef, parameters)
            states, state = decode(net, tokens, state)
            return net.logits(states)[:, 0], state

        rows = jax.NamedSharding(model.mesh, jax.P(("slice", "data")))
        first, state = start(parameters, *(jax.device_put(x, rows) for x in (tokens, lengths)))
        found = [[*np.asarray(first)[b, :n]] for b, n in enumerate(lengths)]
        for i in range(MORE):
            new = jnp.asarray([text[i - MORE] for text in texts], jnp.int32)
            logits, state = step(parameters, jax.device_put(new, rows), state)
            for row, one in zip(found, np.asarray(logits)):
                row.append(one)
    return [np.array(rows) for rows in found], sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize("weight", ["float", "ternary", "bitlinear"])
def test_every_logit_is_that_of_the_whole_text(make, weight):
    """Prompts of unequal lengths in one batch. The state is L x D floats a row, whatever they are.

    Where activations are rounded to 8 bits, the order of a sum may carry one over a tie; what follows from it moves.
    """
    model = make(weight, **MIXER, quantized_head=weight == "bitlinear")
    rows, size = kept(model, texts_of())
    found, expected = np.concatenate(rows), np.concatenate(whole(model, texts_of()))
    assert np.std(expected) > 0.3 and size == len(LENGTHS) * 2 * 32 * 4
    if weight == "bitlinear":
        np.testing.assert_allclose(found, expected, atol=0.05)
        assert np.mean(np.all(np.abs(found - expected) < 1e-4, axis=1)) > 0.7
    else:
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_on_a_mesh(make):
    """Rows over the data axes, the state's dims over "model"."""
    found, _ = kept(make("ternary", mesh=Mesh(1, 2, 2), **MIXER), texts_of())
    for logits, expected in zip(found, whole(make("ternary", **MIXER), texts_of())):
        np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_generation_is_greedy_over_the_whole_text():
    """`spectra generate` on a trained run writes what the parallel form finds likeliest, one prompt or two."""
    model = load(str(trained(*RUN)), devices=jax.devices()[:1])
    prompts = [[5, 9, 40], [17, 3, 8, 60, 2]]
    written = Generator(model).generate(prompts, max_new_tokens=6, temperature=0)
    with jax.set_mesh(model.mesh):
        net = jax.jit(lambda p, x: apply(model.graphdef, p)(x))
        for prompt, row in zip(prompts, written):
            text = [*prompt, *row.tokens]
            logits = np.asarray(net(model.parameters, jnp.asarray([text])))[0, :, : model.tokenizer.vocab_size]
            np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(-1), row.tokens)


def test_what_has_no_keys_and_values(make, tmp_path):
    """8-bit caches, calibration and other people's formats say no."""
    with pytest.raises(UserError, match="cache='int8' is not one of auto"):
        Generator(make("ternary", **MIXER), cache="int8")
    for export in (hf.export, gguf_export.export):
        with pytest.raises(UserError, match="the mixer mlgru is a recurrence in the place of attention"):
            export(str(trained(*RUN)), tmp_path / "out")
    with pytest.raises(UserError, match="has the mixer mlgru, whose layers are calibrated by nothing yet"):
        quantize(
            str(trained("model.mixer=mlgru", "model.K=4")), Config(quantize=Quantize(method="rtn")), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
