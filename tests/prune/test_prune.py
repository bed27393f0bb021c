"""LLM-Pruner against transformers' Llama with torch's gradients in float64, and what its runs are good for."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from helpers import STEPS, TERNARY, T, data, logits, prepare_set, tiny, trained
from llama import NAMES, llama_of

from spectra_jax import cli
from spectra_jax import config as configs
from spectra_jax.compare import compare
from spectra_jax.errors import UserError
from spectra_jax.evaluate.report import evaluate_sets
from spectra_jax.interop.hf import export
from spectra_jax.model.parameters import block_matrices, count
from spectra_jax.prune import pipeline
from spectra_jax.prune.groups import Group, groups_of
from spectra_jax.prune.importance import CRITERIA, channels, mean_gradients
from spectra_jax.prune.pipeline import prune
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.schema import Config, Prune
from spectra_jax.serve.load import load
from spectra_jax.train.workdir import read_config

SAMPLES = 5  # not a multiple of the eight devices
SHAPES = {"grouped": (), "one query a head": ("model.K=4",), "tied": ("model.K=4", "model.tie_embeddings=True")}
HALF = ("criterion=param_first", "ratio=0.5")


def settings(*overrides: str) -> Config:
    """As `spectra prune` is given them, by few samples."""
    few = (f"samples={SAMPLES}", *overrides)
    return configs.override(tiny(), ["family=PrunedLM", "name=pruned", *(f"prune.{text}" for text in few)])


def theirs(run) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """transformers' model of a run in float64, and the samples that the run is pruned by."""
    source, p = load(str(run)), settings("criterion=param_first").prune
    llama = llama_of(source.config.model, jax.device_get(source.parameters), torch.float64)
    records = [torch.tensor(record).long() for record in pipeline.samples(pipeline.sample_loader(source, p), p)]
    return llama, records


def loss(llama: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean over all targets."""
    predicted = llama(rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(predicted.flatten(0, 1), rows[:, 1:].flatten())


def weights_of(llama: torch.nn.Module, layer: int) -> dict[str, torch.nn.Parameter]:
    """Of one layer by the last part of their names, (out, in)."""
    block = llama.model.layers[layer]
    return {name: getattr(part, f"{name}_proj").weight
            for part, names in ((block.self_attn, "qkvo"), (block.mlp, ("gate", "up", "down"))) for name in names}


def with_gradients(llama, records) -> list[dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Of every layer and matrix: weights, gradient of one mean over all samples, mean square of each sample's."""
    squares, layers = [], range(len(llama.model.layers))
    for record in records:
        llama.zero_grad()
        loss(llama, record).backward()
        squares.append([{name: w.grad**2 for name, w in weights_of(llama, layer).items()} for layer in layers])
    llama.zero_grad()
    loss(llama, torch.cat(records)).backward()
    return [
        {name: (w.detach().clone(), w.grad.clone(), sum(each[layer][name] for each in squares) / len(records))
         for name, w in weights_of(llama, layer).items()}
        for layer in layers
    ]


def expected_importance(found, m, criterion) -> tuple[np.ndarray, np.ndarray]:
    """By the paper's words, one head and one channel after the other: (L, K) and (L, F), reduced by the sum."""

    def of_channel(layer: int, name: str, channel: int) -> float:
        """A row of what makes channels, a column of what reads them."""
        where = (slice(None), channel) if name in ("o", "down") else (channel, slice(None))
        w, g, f = (x[where] for x in found[layer][name])
        return {
            "param_first": lambda: (w * g).abs().sum(), "vectorize": lambda: (w * g).sum().abs(),
            "param_second": lambda: (w**2 * f).sum(), "param_mix": lambda: (w * g - 0.5 * w**2 * f).abs().sum(),
            "l1": lambda: w.abs().sum(), "l2": lambda: (w**2).sum(),
        }[criterion]().item()

    heads, hidden = np.zeros((m.L, m.K)), np.zeros((m.L, m.F))
    for layer in range(m.L):
        for name, h in itertools.product("kv", range(m.K * m.H)):
            heads[layer, h // m.H] += of_channel(layer, name, h)
        for name, h in itertools.product("qo", range(m.N * m.H)):
            heads[layer, h // m.H // (m.N // m.K)] += of_channel(layer, name, h)  # who reads a key-value head
        for name, channel in itertools.product(("gate", "up", "down"), range(m.F)):
            hidden[layer, channel] += of_channel(layer, name, channel)
    return heads, hidden


@pytest.mark.parametrize("shape", ["grouped", "one query a head"])
def test_importance_and_what_stays(shape):
    """Against float64; on eight devices, of which none has a sample of its own."""
    run, p = trained(*SHAPES[shape]), settings("ratio=0.5").prune
    llama, records = theirs(run)
    source, torchs = load(str(run)), with_gradients(llama, records)
    m = source.config.model
    with jax.set_mesh(source.mesh):
        gradients = mean_gradients(source, pipeline.samples(pipeline.sample_loader(source, p), p), fisher=True)
        for criterion in CRITERIA:
            found = channels(block_matrices(source.parameters), *gradients, criterion)
            for group, right in zip(groups_of(m), expected_importance(torchs, m, criterion)):
                ours = group.importance(found, "sum")
                # Beside the mean: of "vectorize" summands of both signs cancel.
                error = np.max(np.abs(ours - right) / (right + right.mean()))
                assert error < 2e-5, f"{criterion}, {group.name}: {error}"
                # Each layer by itself: what goes is what matters least.
                gone = np.argsort(right, axis=1)[:, : group.count // 2].tolist()
                stay = [sorted(set(range(group.count)) - set(layer)) for layer in gone]
                assert group.kept(ours, p).tolist() == stay, criterion
    # Of the two that are nearly the same, either's importance would not pass as the other's.
    for first, mix in zip(*(expected_importance(torchs, m, name) for name in ("param_first", "param_mix"))):
        assert np.max(np.abs(first - mix) / (mix + mix.mean())) > 5e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_smaller_model_computes_what_the_larger_does_without_those_parts(shape, tmp_path):
    """In the larger one, by transformers in float64, nothing reads the heads and channels that went."""
    run = trained(*SHAPES[shape])
    out = prune(str(run), settings(*HALF), tmp_path / "cut")
    llama, records = theirs(run)
    m, smaller = load(str(run)).config.model, load(str(out)).config.model
    assert smaller == replace(m, K=m.K // 2, N=m.N // 2, F=m.F // 2)
    heads, hidden = expected_importance(with_gradients(llama, records), m, "param_first")
    with torch.no_grad():
        for layer in range(m.L):
            weights = weights_of(llama, layer)
            for k in np.argsort(heads[layer])[: m.K // 2]:
                width = m.H * m.N // m.K
                weights["o"][:, k * width : (k + 1) * width] = 0
            weights["down"][:, np.argsort(hidden[layer])[: m.F // 2]] = 0
        tokens = np.random.default_rng(0).integers(0, 300, (4, T)).astype(np.int32)
        expected = llama(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits(out, tokens), expected, rtol=0, atol=3e-6)
    assert np.abs(logits(run, tokens) - expected).max() > 1e-2


def test_reductions():
    """By hand: two heads of two channels, two query heads for each, one layer."""
    group = Group("heads", (("attention", "q"), ("attention", "k")), 2, 2)
    q, k = np.array([[1.0, 2, 3, 4, 10, 20, 30, 40]]), np.array([[5.0, 1, 50, 10]])
    # q, its query heads added up: 1+3, 2+4 | 10+30, 20+40
    for name, expected in (
        ("sum", [16, 160]), ("mean", [8, 80]), ("max", [5 + 6, 50 + 60]), ("prod", [20 + 6, 2000 + 600]),
        ("first", [10, 100]),
    ):
        found = group.importance({("attention", "q"): q, ("attention", "k"): k}, name)
        np.testing.assert_array_equal(found, [expected])


@pytest.mark.parametrize(("ratio", "multiple", "heads", "hidden"), [
    (0.25, 1, 2, 48), (0.3, 1, 2, 44), (0.5, 1, 1, 32), (0.4, 8, 2, 40), (0.3, 16, 2, 48), (0.01, 1, 2, 63),
])  # fmt: skip
def test_how_many_stay(ratio, multiple, heads, hidden):
    """int(C (1 - ratio)) channels, at most so many heads go as are whole, and multiples are rounded up."""
    p = Prune(ratio=ratio, multiple=multiple)
    rng = np.random.default_rng(0)
    kept = [group.kept(rng.random((3, group.count)), p) for group in groups_of(tiny().model)]
    assert [each.shape for each in kept] == [(3, heads), (3, hidden)]


def test_random_is_by_seed(tmp_path):
    source, groups = load(str(trained())), groups_of(tiny().model)
    first, again, other = (
        pipeline.importance_of(groups, source, Prune(criterion="random", seed=seed))[0] for seed in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) and not np.array_equal(a, c) for a, b, c in zip(first, again, other))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A pruned run, made by the command line."""
    out = tmp_path_factory.mktemp("pruned") / "cut"
    cli.run(["prune", f"--checkpoint={trained()}", "--config=configs/pruned.py:param_mix", f"--out={out}",
             "--config.prune.ratio=0.5", f"--config.prune.samples={SAMPLES}", "--config.name=half"])
    return out


def test_a_pruned_run_is_a_run_like_any_other(cut, tmp_path):
    """It loads, evaluates, is compared, exported, quantized, and pruned again."""
    model, m, text = load(str(cut)), tiny().model, str(prepare_set(tmp_path / "text"))
    shape = replace(m, K=1, N=2, F=32)
    made = configs.override(tiny(), ["family=PrunedLM", "name=half", "prune.criterion=param_mix", "prune.ratio=0.5",
                                     f"prune.samples={SAMPLES}"])
    assert read_config(cut) == replace(made, model=shape) and model.step == STEPS
    assert model.record["pruned"]["parameters"] == [count(m).total, count(shape).total]
    assert model.record["pruned"]["of"] == str(trained()) and len(model.record["data_fingerprint"]) == 64
    whole, pruned = (evaluate_sets(load(str(run)), [text])[text].loss for run in (trained(), cut))
    assert 0 < pruned - whole < 0.5
    rows = compare([str(trained()), str(cut)], None, sets=[text]).splitlines()[1:3]
    assert [int(row.split()[1].replace(",", "")) for row in rows] == [count(m).total, count(shape).total]
    tokens = np.random.default_rng(0).integers(0, 300, (2, T)).astype(np.int32)
    from transformers import AutoModelForCausalLM

    export(str(cut), tmp_path / "hf")
    with torch.no_grad():
        hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
        expected = hf(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits(cut, tokens), expected, rtol=0, atol=1e-5)
    q = configs.override(tiny(), ["quantize.method=gptq", "quantize.group=16", "quantize.block=16",
                                  "quantize.samples=8", "quantize.bits=8", "family=QuantLM"])
    quantized = quantize(str(cut), q, tmp_path / "8bit")
    assert load(str(quantized)).config.model == shape
    assert abs(evaluate_sets(load(str(quantized)), [text])[text].loss - pruned) < 0.01
    again = prune(str(cut), settings("criterion=l2", "ratio=0.25"), tmp_path / "again")
    assert load(str(again)).config.model == replace(shape, F=24)


def test_what_cannot_be_pruned(cut, tmp_path):
    other = prepare_set(tmp_path / "other", tokenizer="train:290", seed=3)
    longer = prepare_set(tmp_path / "longer", tokenizer=str(trained() / "tokenizer.json"), context=2 * T)
    for source, options, message in (
        (trained(*TERNARY), HALF, "is quantized .*; prune a float model, then quantize that"),
        (trained(), (), "criterion='none' is not one of param_first"),
        (trained(), ("criterion=param_frist",), "did you mean param_first"),
        (trained(), (*HALF, "reduction=som"), "did you mean sum"),
        (trained(), (*HALF, "samples=10000"), "samples=10000 is more than the .* records of 16 tokens"),
        (trained(), (*HALF, f"sets={other}"), "tokenized with another tokenizer"),
        (trained(), (*HALF, f"sets={longer}"), "records of 32 tokens, the model reads 16"),
        (trained(), ("criterion=l1", "ratio=0.99"), "ratio=0.99 leaves none of 2 key-value heads a layer; use at most"),
        (trained(), ("criterion=l1", "ratio=0.01", "multiple=8"), "nothing would go: of 2 key-value heads and 64 ch"),
    ):
        with pytest.raises(UserError, match=message):
            prune(str(source), settings(*options), tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))
    for ratio in (0.0, 1.0):
        with pytest.raises(UserError, match=f"config.prune.ratio={ratio} is the share that goes: between 0 and 1"):
            settings(f"ratio={ratio}")
    with pytest.raises(UserError, match="exists, and nothing that was made is ever replaced"):
        prune(str(trained()), settings(*HALF), tmp_path)
    with pytest.raises(UserError, match="config.model.L=3: model and data are the checkpoint's"):
        cli.run(["prune", f"--checkpoint={trained()}", "--config=configs/pruned.py", f"--out={tmp_path / 'o'}",
                 "--config.model.L=3"])


def test_importance_that_is_not_finite():
    group = groups_of(tiny().model)[1]
    with pytest.raises(UserError, match="importance of channels of the MLP is NaN or infinite"):
        group.kept(np.full((2, group.count), np.nan), Prune())


def test_every_matrix_is_in_one_group():
    keys = [key for group in groups_of(tiny().model) for key in group.keys]
    assert sorted(keys) == sorted(NAMES) == sorted(block_matrices(load(str(trained())).parameters))


def test_data_is_what_the_run_was_trained_on():
    source = load(str(trained()))
    assert [str(folder) for folder in pipeline.sample_loader(source, settings(*HALF).prune).folders] == [str(data())]
