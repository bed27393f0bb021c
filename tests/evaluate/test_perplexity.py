"""Loss, perplexity and bits per byte against numpy on the logits of the same records."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from helpers import TERNARY, copy_of, data, prepare_set, spectra, trained

from spectra_jax import config as configs
from spectra_jax.data.loader import Loader
from spectra_jax.data.manifest import Manifest
from spectra_jax.errors import UserError
from spectra_jax.evaluate.perplexity import Quality, short_names
from spectra_jax.evaluate.report import evaluate_checkpoint, evaluate_sets
from spectra_jax.model.parameters import apply
from spectra_jax.serve.load import Loaded, load
from spectra_jax.stored import parse_checkpoint


@pytest.fixture(scope="module")
def model() -> Loaded:
    """A trained model on one device, for which the validation split is one full and one partial batch of 8."""
    return load(str(trained(*TERNARY)), devices=jax.devices()[:1])


def by_hand(model: Loaded, split: str, count: int | None = None) -> Quality:
    """What `evaluate` should say of the first `count` records, from logits, in float64."""
    loader = Loader([(data(), 1.0)], split=split, T=16, B=1, V=304, seed=0)
    records = loader.records(0, count or len(loader))
    with jax.set_mesh(model.mesh):
        logits = jax.jit(lambda p, x: apply(model.graphdef, p)(x))(model.parameters, records[:, :-1])
    z = np.asarray(logits, np.float64)
    logp = z - z.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logp, records[:, 1:, None], axis=-1)[..., 0].mean(axis=1)
    text = json.loads((data() / "manifest.json").read_text())["splits"][split]
    per_byte = text["tokens"] / text["bytes"] / math.log(2)
    error = losses.std(ddof=1) / math.sqrt(len(losses))
    return Quality(losses.mean(), error, losses.mean() * per_byte, error * per_byte, records[:, 1:].size, len(records))


@pytest.mark.parametrize(("split", "sequences"), [("validation", None), ("validation", 5), ("train", 17)])
def test_against_numpy(model, split, sequences):
    found = evaluate_sets(model, [str(data())], split, sequences)[str(data())]
    expected = by_hand(model, split, sequences)
    assert expected.sequences % 8, "the last batch should be a partial one"
    for name, value in dataclasses.asdict(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5 if "error" not in name else 1e-3), name
    assert found.perplexity == pytest.approx(math.exp(expected.loss), rel=1e-5)
    assert found.perplexity_error == pytest.approx(math.exp(expected.loss) * expected.loss_error, rel=1e-3)


def test_bits_per_byte_count_the_bytes_of_the_text():
    """The manifest's bytes against the texts themselves: bits per byte compare across tokenizers only if they agree."""
    splits = Manifest.load(data()).splits
    source = data().with_name("data-source.jsonl")
    written = sum(len(json.loads(line)["text"].encode()) for line in source.read_text().splitlines())
    held = sum(split.bytes for split in splits.values())
    assert 0.85 * written < held <= written  # the ends of parts that fill no record are dropped


def test_latent_and_frozen_models_are_one(model):
    latent = load(str(trained(*TERNARY)), latent=True, devices=jax.devices()[:1])
    a, b = (evaluate_sets(m, [str(data())])[str(data())] for m in (model, latent))
    assert a == b


def test_on_all_devices(model):
    """64 rows a batch over 8 devices, of which the split fills a few."""
    found = evaluate_sets(load(str(trained(*TERNARY))), [str(data())])[str(data())]
    expected = by_hand(model, "validation")
    assert (found.sequences, found.tokens) == (expected.sequences, expected.tokens)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_set_of_another_tokenizer_is_refused(model, tmp_path):
    other = prepare_set(tmp_path / "other", seed=3, tokenizer="train:290")
    with pytest.raises(UserError, match=r"other was tokenized with another tokenizer \(sha256 \w{12}\) than the "
                                        r"model's \(\w{12}\); prepare it with --tokenizer=WORKDIR/tokenizer.json"):
        evaluate_sets(model, [str(other)])
    fitting = prepare_set(tmp_path / "fitting", seed=3, tokenizer=str(trained(*TERNARY) / "tokenizer.json"))
    assert evaluate_sets(model, [str(fitting)])[str(fitting)].loss > 0


@pytest.mark.parametrize("sequences", [0, -3])
def test_no_sequences(model, sequences):
    with pytest.raises(UserError, match=f"{sequences} sequences to evaluate on; ask for at least 1"):
        evaluate_sets(model, [str(data())], sequences=sequences)


def test_unknown_split(model):
    with pytest.raises(UserError, match="the split 'test' holds no records"):
        evaluate_sets(model, [str(data())], "test")


def test_names_of_sets():
    assert short_names(["data/web", "data/books"]) == ["web", "books"]
    assert short_names(["a/set", "b/set", "c"]) == ["a/set", "b/set", "c"]


def test_the_table():
    """The command, on the newest checkpoint and on an earlier one."""
    workdir = trained(*TERNARY)
    expected = by_hand(load(str(workdir), devices=jax.devices()[:1]), "validation")
    done = spectra(f"--checkpoint={workdir}", f"--sets={data()}", module="spectra_jax.evaluate")
    assert done.returncode == 0, done.stderr
    title, head, row = done.stdout.splitlines()
    assert title == "FloatLM run, step 12, split validation"
    assert head.split() == ["set", "tokens", "loss", "perplexity", "bits/byte"]
    cells = row.replace(",", "").split()
    assert cells[0] == "data" and int(cells[1]) == expected.tokens
    assert float(cells[2]) == pytest.approx(expected.loss, abs=2e-4)
    assert float(cells[5]) == pytest.approx(math.exp(expected.loss), rel=1e-3)
    assert float(cells[8]) == pytest.approx(expected.bits_per_byte, abs=2e-4)
    assert evaluate_checkpoint(f"{workdir}@4", None, "validation", 8).startswith("FloatLM run, step 4, split valid")


def test_by_packed_weights():
    """On all devices, each with a part of the rows, against float matrices."""
    titles, losses = zip(*(
        (lines[0], float(lines[2].replace(",", "").split()[2])) for lines in (
            evaluate_checkpoint(str(trained(*TERNARY)), None, "validation", 16, weights=weights).splitlines()
            for weights in ("dense", "packed")
        )
    ))
    assert "weights" not in titles[0] and "weights by 'cpu'" in titles[1]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


# Loading


def test_checkpoint_names(tmp_path):
    assert parse_checkpoint("runs/a") == (parse_checkpoint("runs/a@7")[0], None)
    assert parse_checkpoint("runs/a@7")[1] == 7
    with pytest.raises(UserError, match="runs/a@last: 'last' is not a step; write WORKDIR"):
        parse_checkpoint("runs/a@last")
    with pytest.raises(UserError, match="run has no checkpoint of step 5; it has .4, 8, 12."):
        load(f"{copy_of(trained(*TERNARY), tmp_path / 'run')}@5")
    with pytest.raises(UserError, match="nothing holds no run: it has no config.json"):
        load(str(tmp_path / "nothing"))


def test_what_is_loaded(model):
    assert model.step == 12 and load(f"{trained(*TERNARY)}@8", devices=jax.devices()[:1]).step == 8
    assert configs.from_dict(model.record["config"]).model == model.config.model
    assert model.tokenizer.sha256 == Manifest.load(data()).tokenizer["sha256"]
