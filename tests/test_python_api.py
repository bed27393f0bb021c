"""The interface from Python against the commands' own functions."""

import inspect
import subprocess
import sys

import pytest
from helpers import ROOT, TERNARY, TINY, copy_of, data, environment, texts, tiny, trained

import spectra_jax
from spectra_jax import api, config
from spectra_jax.data.manifest import Manifest
from spectra_jax.errors import UserError
from spectra_jax.evaluate.report import evaluate_sets
from spectra_jax.plan.report import plan as printed_plan
from spectra_jax.serve.load import load

TINY_VALUES = dict(text.split("=", 1) for text in TINY) | {"data.sets": (str(data()),)}


def test_packages_are_functions_and_packages():
    import spectra_jax.train.loop

    for name in ("prepare", "train", "evaluate", "quantize", "prune", "plan"):
        package = getattr(spectra_jax, name)
        assert inspect.signature(package) == inspect.signature(getattr(api, name)) and name in dir(spectra_jax)
    assert inspect.ismodule(spectra_jax.train) and spectra_jax.train.loop.train is not spectra_jax.train
    with pytest.raises(AttributeError, match="has no attribute 'tarin'; it has load, analysis, evaluate, plan"):
        spectra_jax.tarin  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'plot'; it has accelerators, axes, comparison"):
        spectra_jax.analysis.plot  # noqa: B018


def test_importing_it_is_free():
    """Whoever needs an error class or the parser does not wait for JAX."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, spectra_jax, spectra_jax.errors, spectra_jax.parser, spectra_jax.train\n"
         "print([name for name in ('jax', 'pandas', 'matplotlib') if name in sys.modules])"],
        env=environment(), cwd=ROOT, capture_output=True, text=True, check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir and what `train` returned."""
    folder = tmp_path_factory.mktemp("api") / "run"
    return folder, spectra_jax.train(config.default(), folder, TINY_VALUES)


def test_train(run):
    folder, curve = run
    assert list(curve["step"]) == list(range(1, 13)) and curve["loss"].iloc[-1] < curve["loss"].iloc[0]
    assert "kind" not in curve and list(spectra_jax.analysis.runs.records(folder, "eval")["step"]) == [6, 12]
    again = spectra_jax.train(tiny(), folder)
    assert again["loss"].tolist() == curve["loss"].tolist(), "a Config does, and nothing is trained twice"
    with pytest.raises(UserError, match="kind='evals' is not one of train, eval, .*; did you mean eval"):
        spectra_jax.analysis.runs.records(folder, "evals")


def test_evaluate(run, tmp_path):
    folder, _ = run
    table = spectra_jax.evaluate([folder, f"{folder}@8"])
    assert list(table["model"].unique()) == ["run", "run@8"] and set(table["on"]) == {"data"}
    expected = evaluate_sets(load(str(folder)), [str(data())])[str(data())]
    first = table[table["step"] == 12].set_index("metric")
    assert first.loc["loss", "value"] == expected.loss and first.loc["loss", "error"] == expected.loss_error
    assert first.loc["perplexity", "value"] == expected.perplexity
    assert first.loc["bits_per_byte", "value"] == expected.bits_per_byte
    (tmp_path / "essay.txt").write_text(" ".join(texts(2)))
    (tmp_path / "task.jsonl").write_text('{"context": "the", "choices": [" whale", " ocean"], "gold": 1}\n')
    mixed = spectra_jax.evaluate(folder, texts=[tmp_path / "essay.txt"], tasks=[tmp_path / "task.jsonl"])
    assert set(mixed["on"]) == {"essay.txt", "task"} and {"acc", "loss"} <= set(mixed["metric"])
    with pytest.raises(UserError, match="absent"):
        spectra_jax.evaluate(tmp_path / "absent")


def test_quantize_and_load(run, tmp_path):
    folder, _ = run
    out = spectra_jax.quantize(folder, f"{ROOT}/configs/quantlm.py:rtn", tmp_path / "4bit", {"quantize.group": 16})
    assert out == tmp_path / "4bit" and spectra_jax.analysis.runs.table([out])["bits"][0] == 4
    assert spectra_jax.load(str(out)).generate(["the"], max_new_tokens=2)[0].tokens
    with pytest.raises(UserError, match="4bit exists"):
        spectra_jax.quantize(folder, f"{ROOT}/configs/quantlm.py:rtn", tmp_path / "4bit")


def test_prepare(tmp_path):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts(30)))
    table = spectra_jax.prepare(
        [tmp_path / "a.txt"], tmp_path / "set", tokenizer="train:290", context=16, validation_percent=20.0, workers=1
    ).set_index("split")
    manifest = Manifest.load(tmp_path / "set")
    assert {name: split.records for name, split in manifest.splits.items()} == table["records"].to_dict()


def test_plan_agrees_with_what_is_printed():
    spec = f"{ROOT}/configs/trilm.py:390m"
    row = spectra_jax.plan(spec, "v5e:2x4", {"model.remat": "full", "data.batch": 64}).iloc[0]
    text = printed_plan(config.load(spec, ["model.remat=full", "data.batch=64"]), ["v5e:2x4"])
    assert f"about {row['memory']:.2f} in all" in text and f"MFU at most {row['mfu']:.0%}" in text
    assert f"{row['tokens_per_second']:,.0f} tokens/s" in text and f"{row['days']:,.1f} days" in text
    assert row["mesh"] == "1 x 8 x 1" and row["fits"] and row["chips"] == 8
    best = spectra_jax.plan(spec, ["v5e-16", "h100:8"], search=2)
    assert list(best["topology"]) == ["v5e-16"] * 2 + ["h100:8"] * 2 and best["fits"].all()
    assert best["changes"].str.startswith("--config.").all()
    with pytest.raises(UserError, match="--topology='v9' is not known"):
        spectra_jax.plan(spec, "v9")


def test_configs_in_any_form():
    spec = f"{ROOT}/configs/trilm.py:99m"
    assert api.config_of(spec) == api.config_of(config.load(spec)) == config.load(spec)
    changed = api.config_of(spec, {"model.L": 3, "data.sets": ("a", "b=2"), "schedule.remove_decay": False})
    assert (changed.model.L, changed.data.sets, changed.schedule.remove_decay) == (3, ("a", "b=2"), False)
    with pytest.raises(UserError, match="unknown key config.model.l; did you mean config.model.L"):
        api.config_of(spec, {"model.l": 3})


def test_resuming_another_run_is_refused(tmp_path):
    copy = copy_of(trained(*TERNARY), tmp_path / "run")
    with pytest.raises(UserError, match="holds another run; these differ"):
        spectra_jax.train(tiny(), copy)
