"""From a trained float run to a quantized one: what it writes, what it survives, what it refuses."""

import itertools
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import STEPS, TERNARY, data, environment, logits, prepare_set, same_bits, tiny, trained

from spectra_jax import cli
from spectra_jax import config as configs
from spectra_jax.compare import compare
from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.evaluate.report import evaluate_sets
from spectra_jax.interop.hf import export
from spectra_jax.model.parameters import block_matrices, init_parameters
from spectra_jax.quantize import pipeline
from spectra_jax.quantize.blocks import INPUT_OF, Blocks
from spectra_jax.quantize.gptq import gptq
from spectra_jax.quantize.methods import get_method
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.schema import Config
from spectra_jax.serve.load import load
from spectra_jax.train.workdir import read_config
from spectra_jax.weights.grid import Grid

GPTQ3 = ("method=gptq", "bits=3", "group=16", "block=16")


def settings(*overrides: str) -> Config:
    """A QuantLM of the tiny run, by few samples."""
    few = ("samples=16", "batch=8", *overrides)
    return configs.override(tiny(), ["family=QuantLM", "name=quantlm", *(f"quantize.{text}" for text in few)])


@pytest.fixture(scope="module")
def quantlm(tmp_path_factory):
    """GPTQ at 3 bits, made by the command line's own function."""
    return quantize(str(trained()), settings(*GPTQ3), tmp_path_factory.mktemp("quantlm") / "3bit")


def test_what_is_written_is_what_was_solved(quantlm):
    """The first layer again by hand: Hessians from the inputs that its matrices get, then GPTQ; same codes."""
    source = load(str(trained()))
    q, m = settings(*GPTQ3).quantize, source.config.model
    found = block_matrices(load(str(quantlm)).parameters)
    with jax.set_mesh(source.mesh):
        tokens, _ = pipeline.calibration(source, q)
        embedding = np.asarray(source.parameters["embedding"])
        layer = jax.tree.map(lambda leaf: leaf[0], source.parameters["blocks"])
        x = jnp.concatenate([jnp.asarray(embedding[np.asarray(ids)]) for ids in tokens])
        inputs = Blocks(m).inputs(layer, x)
        for module, name in (("attention", "k"), ("attention", "o"), ("mlp", "up"), ("mlp", "down")):
            rows = np.asarray(inputs[INPUT_OF[module, name]], np.float64).reshape(-1, layer[module][name]["w"].shape[0])
            h = jnp.asarray(2 * rows.T @ rows / len(x), jnp.float32)
            w = jnp.asarray(np.asarray(layer[module][name]["w"]))
            expected, stored = gptq(w, h, q), jax.tree.map(lambda leaf: leaf[0], found[module, name])
            different = np.mean(np.asarray(stored.codes) != np.asarray(expected.codes))
            assert different <= 0.01, f"{module}.{name}: {different:.2%} of the codes"  # ties and what follows them
            np.testing.assert_array_equal(stored.scales.dtype, jnp.float16)


def test_a_quantized_run_is_a_run_like_any_other(quantlm, tmp_path):
    """It loads, evaluates, is exported and compared; 3 bits cost some quality, and little."""
    model, text = load(str(quantlm)), str(prepare_set(tmp_path / "text"))
    assert (model.step, model.config.family, model.config.model) == (STEPS, "QuantLM", tiny().model)
    # Nothing of the machine that quantized it: batch and mesh are those of training.
    assert read_config(quantlm) == replace(tiny(), family="QuantLM", name="quantlm", quantize=settings(*GPTQ3).quantize)
    assert all(isinstance(w, Grid) and w.bits == 3 for w in block_matrices(model.parameters).values())
    quantized, float_ = (evaluate_sets(load(str(run)), [text])[text].loss for run in (quantlm, trained()))
    assert -0.01 < quantized - float_ < 0.05
    table = compare([str(trained()), str(quantlm)], tmp_path / "bits.png", sets=[text]).splitlines()
    rows = {line.split()[0]: line.split() for line in table[1:3]}
    assert float(rows["3bit"][2]) == 4.0 and float(rows["run0" if "run0" in rows else trained().name][2]) == 16.0
    assert (tmp_path / "bits.png").stat().st_size > 1000


def test_bits_are_those_of_what_is_stored(quantlm):
    """3 bits a code and a scale of 16 bits for 16 weights; the paper counts 32 bits for each group."""
    model = load(str(quantlm))
    weights = sum(w.weights for w in block_matrices(model.parameters).values())
    rest = sum(leaf.size for leaf in jax.tree.leaves(model.parameters)) - sum(
        leaf.size for w in block_matrices(model.parameters).values() for leaf in jax.tree.leaves(w)
    )
    gains = 2 * 2 * 32 + 32
    assert model.record["quantized"]["stored_bits"] == (3 + 16 / 16) * weights + 16 * rest
    assert model.record["quantized"]["paper_bits"] == (3 + 32 / 16) * weights + 16 * (rest - gains)


def test_transformers_computes_the_same(quantlm, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    export(str(quantlm), tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, 300, (2, 16)).astype(np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits(quantlm, tokens), expected, atol=1e-4)


def test_another_seed_is_another_calibration(quantlm, tmp_path):
    again = quantize(str(trained()), settings(*GPTQ3), tmp_path / "again")
    other = quantize(str(trained()), settings(*GPTQ3, "seed=1"), tmp_path / "other")
    first, second, third = (parameters_of(run) for run in (quantlm, again, other))
    assert same_bits(first, second) and not same_bits(first, third)


def parameters_of(run) -> dict:
    """The parameters of the one checkpoint."""
    model = load(str(run))
    return jax.device_get(model.parameters)


@pytest.mark.parametrize("options", [
    ("method=gptq", "bits=4", "group=16", "block=16", "true_sequential=True"),
    ("method=gptq", "bits=4", "group=0", "act_order=True", "float64=True"),
    ("method=gptq", "bits=4", "group=16", "block=16", "grid=gptq_asymmetric", "act_order=True", "mse=True"),
    ("method=rtn", "bits=8", "group=0", "grid=absmax", "scale_dtype=bfloat16"),
])  # fmt: skip
def test_options_all_the_way_to_the_disk(options, tmp_path):
    # Text like that of the calibration: for other inputs, with so few samples, GPTQ may do worse than rounding.
    tokens = Loader([(data(), 1.0)], split="validation", T=16, B=8, V=304, seed=0).records(0, 8)[:, :-1]
    run = quantize(str(trained()), settings(*options), tmp_path / "q")
    error = np.abs(logits(run, tokens) - logits(trained(), tokens)).max()
    assert 0 < error < 0.08  # of logits up to 2


@pytest.mark.slow
def test_a_kill_between_layers_changes_nothing(tmp_path):
    """kill -9 when the first layer is there; the same command makes the same bits, and does not do it again."""
    config = tmp_path / "quantlm.py"
    config.write_text(
        "from spectra_jax import config\n\n\ndef get_config():\n    c = config.default()\n"
        "    c.family, c.name = 'QuantLM', 'quantlm'\n"
        "    c.quantize.update(method='gptq', bits=3, group=16, block=16, samples=16, batch=8)\n    return c\n"
    )
    out, whole = tmp_path / "q", tmp_path / "whole"
    run = {"env": environment(quick=False), "text": True}

    def command(out) -> list[str]:
        return [sys.executable, "-m", "spectra_jax.cli", "quantize", f"--checkpoint={trained()}", f"--config={config}",
                f"--out={out}"]

    first = subprocess.Popen(command(out), stderr=subprocess.PIPE, **run)
    until = time.monotonic() + 120
    while not (kept := list(tmp_path.glob(".q.*.layers/0000.safetensors"))) and time.monotonic() < until:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert kept and not out.exists()
    second = subprocess.run(command(out), capture_output=True, check=True, **run)
    assert "layer 1/2" not in second.stderr and "layer 2/2" in second.stderr
    assert not kept[0].exists()
    subprocess.run(command(whole), capture_output=True, check=True, **run)
    assert same_bits(parameters_of(out), parameters_of(whole))


def test_finished_layers_of_other_settings_are_not_taken(tmp_path):
    from spectra_jax.quantize.finished import Layers

    tree = {"w": np.ones((2, 3), np.float32), "norm": {"gain": np.zeros(2, np.float32)}}
    Layers(tmp_path / "q", {"bits": 3}).save(0, tree, {"w": 0.5})
    found, errors = Layers(tmp_path / "q", {"bits": 3}).load(0, tree)
    assert same_bits(found, tree) and errors == {"w": 0.5}
    assert Layers(tmp_path / "q", {"bits": 4}).load(0, tree) is None
    assert Layers(tmp_path / "q", {"bits": 3}).load(0, tree) is not None  # nothing was thrown away
    Layers(tmp_path / "q", {"bits": 3}).save(1, tree, {})
    (file,) = tmp_path.glob(".q.*.layers/0001.safetensors")
    file.write_bytes(file.read_bytes()[:-5])  # cut short
    assert Layers(tmp_path / "q", {"bits": 3}).load(1, tree) is None


def test_what_cannot_be_quantized(tmp_path, quantlm):
    other = prepare_set(tmp_path / "other", tokenizer="train:290", seed=3)
    for source, options, message in (
        (trained(*TERNARY), GPTQ3, "is quantized already"),
        (quantlm, GPTQ3, "is quantized already"),
        (trained(), (*GPTQ3, "samples=10000"), "samples=10000 must be a multiple of the 8 .* at most the"),
        (trained(), (*GPTQ3, "samples=12"), "samples=12 must be a multiple of the 8"),
        (trained(), (*GPTQ3, f"sets={other}"), "tokenized with another tokenizer"),
        (trained(), ("method=gptq", "group=20"), "group=20 does not divide the 32 inputs of layer 0, attention.q"),
        (trained(), ("method=gtpq",), "did you mean gptq"),
        (trained(), ("method=gptq", "grid=gptk"), "did you mean gptq"),
    ):
        with pytest.raises(UserError, match=message):
            quantize(str(source), settings(*options), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="exists, and nothing that was made is ever replaced"):
        quantize(str(trained()), settings(*GPTQ3), tmp_path)


def test_only_the_quantization_can_be_set(tmp_path):
    command = ["quantize", f"--checkpoint={trained()}", "--config=configs/quantlm.py:3bit", f"--out={tmp_path / 'q'}"]
    with pytest.raises(UserError, match="config.model.L=3: model and data are the checkpoint's"):
        cli.run([*command, "--config.model.L=3"])
    with pytest.raises(UserError, match="unknown key config.quantize.bit; did you mean config.quantize.bits"):
        cli.run([*command, "--config.quantize.bit=3"])
    with pytest.raises(UserError, match="'3bits' is not one of .* did you mean 3bit"):
        cli.run(["quantize", "--checkpoint=x", "--config=configs/quantlm.py:3bits", "--out=y"])


def test_presets_name_methods_and_grids_that_exist():
    presets = configs.run_config_file("configs/quantlm.py", "presets")
    assert {"3bit", "4bit", "6bit", "8bit"} < set(presets)
    for name in presets:
        q = configs.load(f"configs/quantlm.py:{name}").quantize
        get_method(q.method, q.grid)


def test_weights_that_are_not_finite():
    m = tiny().model
    parameters = jax.tree.map(lambda leaf: leaf[0], init_parameters(m, jax.random.key(0))["blocks"])
    parameters["mlp"]["up"]["w"] = parameters["mlp"]["up"]["w"].at[0, 0].set(jnp.nan)
    with pytest.raises(UserError, match="layer 1, mlp.up: NaN or infinite weights"):
        pipeline.quantize_block(Blocks(m), parameters, [], settings("method=rtn").quantize, "layer 1")


def test_every_matrix_has_an_input():
    assert set(INPUT_OF) == set(itertools.chain(*pipeline.STAGES))
