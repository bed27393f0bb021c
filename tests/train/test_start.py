"""Runs that begin with other weights or learn from a teacher: what they begin with, that they resume, refusals."""

import functools
import shutil

import jax
import numpy as np
import pytest
from helpers import SCRATCH, TERNARY, copy_of, data, prepare_set, same_bits, state_on_disk, tiny, trained

from spectra_jax.analysis.dynamics import updates
from spectra_jax.errors import UserError
from spectra_jax.evaluate.report import evaluate_sets
from spectra_jax.metrics import read as read_metrics
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.serve.load import load
from spectra_jax.sharding import make_mesh
from spectra_jax.train.blockwise_state import Blockwise, dequantize
from spectra_jax.train.dynamic_map import SIGNED, UNSIGNED
from spectra_jax.train.loop import train
from spectra_jax.train.start import first_state
from spectra_jax.train.step import init_state


@functools.cache
def pruned():
    """Half of the weights of `trained()` are gone."""
    quantize(str(trained()), tiny("quantize.method=magnitude", "quantize.scale_dtype=float32"), SCRATCH / "pruned")
    return SCRATCH / "pruned"


def latents(folder, step):
    return state_on_disk(folder, step)["parameters"]


def first_parameters(*overrides):
    """Of a run on one device, before its first step."""
    config = tiny(*overrides)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(first_state(config, mesh, jax.random.key(0))["parameters"])


@pytest.mark.parametrize("weight", ["float", "ternary", "dlt:group=8", "lrqat:group=8,rank=2", "bitnet158"])
def test_the_first_weights_are_those_of_the_other_run(weight):
    source = trained()
    theirs, ours = latents(source, 12), first_parameters(f"model.weight={weight}", f"train.start={source}")
    np.testing.assert_array_equal(ours["embedding"], theirs["embedding"])
    w, master = ours["blocks"]["mlp"]["up"]["w"], theirs["blocks"]["mlp"]["up"]["w"]
    if weight.startswith("lrqat"):
        steps = np.repeat(w.scale.astype(np.float16).astype(np.float32), 8, axis=1) / 16  # of 8 - 4 bits
        inside = (w.master > -127) & (w.master < 112)  # between -8 and 7, in sixteenths
        assert (np.abs(w.master * steps - master) <= 0.5001 * steps)[inside].all() and inside.mean() > 0.5
        assert w.master.dtype == np.int8 and not w.a.any() and 0 < np.abs(w.b).max() <= 32**-0.5
    else:
        np.testing.assert_array_equal(w.w if weight.startswith("dlt") else w, master)
    assert ("attention_norm" in ours["blocks"]) == (weight != "bitnet158")


def test_a_quantized_run_is_begun_with_what_its_forms_stand_for():
    found = first_parameters(f"train.start={pruned()}")["blocks"]["mlp"]["up"]["w"]
    forms = load(str(pruned())).parameters["blocks"]["mlp"]["up"]["w"]
    np.testing.assert_array_equal(found != 0, np.asarray(forms.mask))
    np.testing.assert_array_equal(found, np.asarray(jax.vmap(lambda one: one.dequantize())(forms)))


def test_a_run_begins_with_the_matrices_of_one_that_trained_factors():
    source = trained("model.weight=lrqat:group=8,rank=2")
    found = first_parameters(f"train.start={source}")["blocks"]["mlp"]["up"]["w"]
    form = load(str(source)).parameters["blocks"]["mlp"]["up"]["w"]
    scales = np.repeat(np.asarray(form.scales, np.float32), 8, axis=1)
    np.testing.assert_array_equal(found, np.asarray(form.codes, np.float32) * scales)
    with pytest.raises(UserError, match="there is no matrix whose way could be followed"):
        updates(source)


def test_nothing_is_kept_of_what_is_not_trained():
    """LR-QAT: a byte for each weight, and two moments of factors and scales."""
    config = tiny("model.weight=lrqat:group=8,rank=2", "optimizer.only=w.a,w.b,w.scale")
    state = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
    up = state["parameters"]["blocks"]["mlp"]["up"]["w"]
    assert up.master.dtype == np.int8 and up.master.size == 2 * 32 * 64
    trained = sum(part.size for node in ("attention", "mlp") for matrix in state["parameters"]["blocks"][node].values()
                  for part in (matrix["w"].a, matrix["w"].b, matrix["w"].scale))
    moments = [leaf for leaf in jax.tree.leaves(state["optimizer"]) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * trained


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("model.weight=dlt:group=16", "optimizer.rates=w.scale=0.1,w.shift=0.1", "distill.teacher={source}"),
        ("model.weight=lrqat:group=16,rank=4", "optimizer.only=w.a,w.b,w.scale", "optimizer.rates=w.scale=0.01"),
        ("model.weight=sparse", "optimizer.keep_zeros=True"),
        (*TERNARY, "optimizer.keep_zeros=True"),
        ("model.weight=sparse", "optimizer.keep_zeros=True", "optimizer.name=adamw8bit", "optimizer.float_below=1024"),
    ],
    ids=["dlt", "lrqat", "sparse", "sparse-ternary", "sparse-8bit"],
)
def test_it_trains_and_resumes_bit_for_bit(overrides, tmp_path):
    source = pruned() if "optimizer.keep_zeros=True" in overrides else trained()
    config = [text.format(source=source) for text in overrides] + [f"train.start={source}"]
    whole = tmp_path / "whole"
    train(tiny(*config), whole)
    resumed = copy_of(whole, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "12")
    train(tiny(*config), resumed)
    after = state_on_disk(whole, 12)
    assert same_bits(after, state_on_disk(resumed, 12))
    losses = [record["loss"] for record in read_metrics(whole) if record["kind"] == "train"]
    assert losses[-1] < losses[0]
    model = load(str(whole))  # frozen, it gives the loss that training saw
    seen = [record for record in read_metrics(whole) if record["kind"] == "eval"][-1]["loss"]
    assert evaluate_sets(model, [str(data())], "validation", 8)[str(data())].loss == pytest.approx(seen, rel=2e-6)
    if "optimizer.keep_zeros=True" in overrides:
        assert len(updates(whole)) == 2 * 2 * 7  # between checkpoints of steps 4, 8 and 12
        mask = np.asarray(load(str(source)).parameters["blocks"]["mlp"]["up"]["w"].mask)
        w = after["parameters"]["blocks"]["mlp"]["up"]["w"]
        assert 0.4 < mask.mean() < 0.6 and not w[~mask].any() and (w[mask] != 0).mean() > 0.99
        moments = [leaf for path, leaf in jax.tree.leaves_with_path(after["training"])
                   if "up" in jax.tree_util.keystr(path) and leaf.dtype != bool]
        if "optimizer.name=adamw8bit" in overrides:  # of either moment the largest of each block, and codes
            pairs = zip(map(jax.numpy.asarray, moments[::2]), map(jax.numpy.asarray, moments[1::2]), (SIGNED, UNSIGNED))
            moments = [np.asarray(dequantize(Blockwise(codes, largest), kind)) for largest, codes, kind in pairs]
        assert len(moments) == 2 and all(moment[mask].any() and not moment[~mask].any() for moment in moments)
    if any("lrqat" in text for text in overrides):
        first = latents(source, 12)
        np.testing.assert_array_equal(after["parameters"]["embedding"], first["embedding"])
        assert after["parameters"]["blocks"]["mlp"]["up"]["w"]["a"].any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.start={trained}", "model.F=32"], "has F=64, not 32; give this run the same shape"),
        (["train.start={missing}"], "holds no run"),
        (["train.start={trained}", "data.sets={other}"], "was tokenized with another tokenizer"),
        (["distill.teacher={trained}", "model.D=16"], "D=32, not 16; or compare logits alone, with --config.distill"),
        (["distill.teacher={trained}", "distill.logits=0.0", "distill.features=0.0"], "the teacher teaches nothing"),
        (["optimizer.keep_zeros=True"], "no weight of the first model is zero: begin with a pruned one"),
        (["optimizer.only=w.adapter"], "config.optimizer.only=w.adapter names no parameter; they are blocks.attention"),
        (["optimizer.rates=w.scale"], "'w.scale' is not PART=FACTOR"),
        (["optimizer.name=adam8bits"], "is not one of adamw.*"),
        (["model.weight=dlt:group=7"], "group=7 does not divide the 32 inputs of a matrix; use 8, or 0"),
        (["model.weight=dlt:treshold=0.5"], "is not one of group, threshold.*did you mean threshold"),
        (["model.weight=dlt:group=x"], "group='x' is not of type int"),
        (["model.weight=ternary:group"], "setting of config.model.weight=ternary"),
        (["model.weight=float:group=1"], "float has no settings"),
        (["model.weight=lrqat:bits=9"], "from 2 to 7 bits"),
    ],
)
def test_refusals(overrides, message, tmp_path):
    places = {"trained": trained(), "missing": tmp_path / "nothing"}
    if "{other}" in "".join(overrides):
        places["other"] = prepare_set(tmp_path / "other", tokenizer="train:290")
    with pytest.raises(UserError, match=message):
        train(tiny(*(text.format(**places) for text in overrides)), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists() or "no weight of the first" in message
