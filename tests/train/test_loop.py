"""The training loop: bitwise resume, what is written down, which checkpoints stay, and when it gives up."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from helpers import STEPS, TERNARY, TOKENS_PER_STEP, copy_of, data, prepare_set, same_bits, state_on_disk, tiny, trained

from spectra_jax import config as configs
from spectra_jax import metrics
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.schema import Config
from spectra_jax.serve.load import load
from spectra_jax.stored import record_of
from spectra_jax.train.loop import make_loader, train
from spectra_jax.train.schedule import learning_rate, weight_decay
from spectra_jax.verify import checkpoint_rows


def of_kind(workdir, kind: str) -> list[dict]:
    """The records of one kind, without what the clock decides."""
    timed = {"tokens_per_second", "mfu", "stall"}
    return [
        {key: value for key, value in record.items() if key not in timed}
        for record in metrics.read(workdir) if record["kind"] == kind
    ]


def final_state(workdir) -> dict:
    """Everything in the newest checkpoint, as numpy arrays."""
    return state_on_disk(workdir, max(int(path.name) for path in (workdir / "checkpoints").iterdir()))


# Resuming


def the_sums_are_the_wall_time(workdir, restarts: int, redone: int) -> None:
    """Of every time record: what is missing from its clock is when the first process began."""
    records = [r for r in metrics.read(workdir) if r["kind"] == "time"]
    sums = [sum(value for name, value in r.items() if name.startswith("seconds/")) for r in records]
    began = [r["clock"] - total for r, total in zip(records, sums)]
    assert sums == sorted(sums) and max(began) - min(began) < 0.5
    first, last = records[0], records[-1]
    assert first["step"] == first["seconds/lost"] == 0 < last["seconds/lost"] and last["step"] == STEPS
    assert (last["restarts"], last["redone"]) == (restarts, redone)
    assert last["goodput"] == pytest.approx(last["seconds/train"] / sums[-1], abs=1e-3)


@pytest.mark.parametrize(
    ("overrides", "after"),
    [
        (TERNARY, 4),  # the data's first epoch ends in step 9, the peak falls in 7
        (("train.accumulate=2", "data.batch=16", "checkpoint.permanent_tokens=1500"), 6),
        (("optimizer.name=adamw8bit", "optimizer.float_below=1024"), 4),
    ],
    ids=["ternary", "accumulating", "8bit"],
)
def test_resuming_is_bit_equal(tmp_path, overrides, after):
    """As after a kill: the checkpoint of a middle step, and metrics that go beyond it."""
    straight, config = trained(*overrides), tiny(*overrides)
    assert len(make_loader(config, "train")) < STEPS * config.data.batch  # past the end of an epoch
    resumed = copy_of(straight, tmp_path / "run")
    for path in (resumed / "checkpoints").iterdir():
        if int(path.name) > after:
            shutil.rmtree(path)
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "kind": "tra')  # torn by the kill
    last = train(config, resumed)
    for kind in ("train", "eval", "event"):
        assert of_kind(resumed, kind) == of_kind(straight, kind)
    assert same_bits(final_state(resumed), final_state(straight))
    assert last["train"]["step"] == last["eval"]["step"] == STEPS
    weights = [{k: v for k, v in r.items() if not k.endswith("flips")} for r in of_kind(straight, "weights")]
    again = [{k: v for k, v in r.items() if not k.endswith("flips")} for r in of_kind(resumed, "weights")]
    assert again == weights  # flips are since the last look of the same process
    the_sums_are_the_wall_time(resumed, restarts=1, redone=STEPS - after)


def test_permanent_checkpoints_of_weights_alone(tmp_path):
    """They hold what the full ones hold, in a third of the room; where only they are left, training starts anew."""
    overrides = (*TERNARY, "checkpoint.permanent_weights_only=True")
    straight, full = trained(*overrides), trained(*TERNARY)
    rows, full_rows = checkpoint_rows(straight), checkpoint_rows(full)
    assert [(row.step, row.full, row.tokens, row.fault) for row in rows] == [
        (4, False, 512, ""), (8, False, 1024, ""), (12, True, 1536, "")
    ]
    assert rows[1].bytes < 0.5 * full_rows[1].bytes
    assert same_bits(load(f"{straight}@8", latent=True).parameters, load(f"{full}@8", latent=True).parameters)
    resumed = copy_of(straight, tmp_path / "run")
    shutil.rmtree(resumed / "checkpoints" / "12")
    train(tiny(*overrides), resumed)
    assert of_kind(resumed, "train") == of_kind(straight, "train")
    assert [(row.step, row.full) for row in checkpoint_rows(resumed)] == [(4, False), (8, False), (12, True)]
    assert same_bits(final_state(resumed), final_state(straight))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    workdir = copy_of(trained(*TERNARY), tmp_path / "run")
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    last = train(tiny(*TERNARY), workdir)
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before
    assert last["train"]["step"] == last["eval"]["step"] == STEPS
    assert last["train"]["loss"] == of_kind(workdir, "train")[-1]["loss"]


def test_a_run_may_go_on_for_longer_but_not_shorter(tmp_path):
    workdir = copy_of(trained(*TERNARY), tmp_path / "run")
    with pytest.raises(UserError, match="train.steps: 12 -> 10"):
        train(tiny(*TERNARY, "train.steps=10"), workdir)
    with pytest.raises(UserError, match="newest checkpoint is of step 12, beyond the 10 steps of the config"):
        train(tiny(*TERNARY, "train.steps=10"), workdir, accept_changes=True)


# What is written down


def test_training_records():
    workdir, config = trained(*TERNARY), tiny(*TERNARY)
    records = [r for r in metrics.read(workdir) if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for k, r in enumerate(records):
        assert r["tokens"] == (k + 1) * TOKENS_PER_STEP
        assert r["lr"] == pytest.approx(float(learning_rate(config.schedule, STEPS, k)), rel=1e-6)
        assert r["weight_decay"] == float(weight_decay(config.schedule, 0.1, STEPS, k))
        assert r["tokens_per_second"] > 0 and r["mfu"] > 0 and 0 <= r["stall"] <= 1
        assert r["skipped"] == r["skipped_in_a_row"] == 0 and r["grad_norm"] > 0
    losses = [r["loss"] for r in records]
    assert losses[0] == pytest.approx(math.log(config.model.V), abs=0.1)  # it starts knowing nothing
    assert losses[-1] < losses[0] - 1.5
    # MFU is tokens/s times a constant of the model over a constant of the machine.
    ratios = [r["mfu"] / r["tokens_per_second"] for r in records]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6)


def test_events_name_the_interventions():
    events = [r for r in metrics.read(trained(*TERNARY)) if r["kind"] == "event"]
    assert [(r["step"], r["name"]) for r in events] == [(7, "peak lowered"), (9, "decay removed")]
    # They stand at the first step that felt them.
    rates = {r["step"]: r for r in of_kind(trained(*TERNARY), "train")}
    assert rates[7]["lr"] < 0.52 * rates[6]["lr"] and rates[8]["weight_decay"] > 0 == rates[9]["weight_decay"]


def test_weight_records():
    """Zeros, flips and scales per kind of matrix, against numpy on the final checkpoint."""
    workdir = trained(*TERNARY)
    records = of_kind(workdir, "weights")
    assert [r["step"] for r in records] == [1, 4, 8, 12]
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    first, last = records[0], records[-1]
    assert set(first) == {"step", "kind"} | {f"{kind}/{name}" for kind in kinds for name in ("zeros", "scale")}
    assert set(last) == set(first) | {f"{kind}/flips" for kind in kinds}
    model = load(str(workdir), latent=True, devices=jax.devices()[:1])
    for module, kind in (("attention", "q"), ("attention", "o"), ("mlp", "down")):
        w = np.asarray(model.parameters["blocks"][module][kind]["w"], np.float64)
        scale = np.abs(w).mean(axis=(1, 2), keepdims=True)
        assert last[f"{kind}/scale"] == pytest.approx(scale.mean(), rel=1e-3)
        zeros = np.mean(np.abs(w) < scale / 2)
        assert last[f"{kind}/zeros"] == pytest.approx(zeros, abs=0.005) and 0.2 < zeros < 0.5
        assert 0 < last[f"{kind}/flips"] < 0.5


def test_evaluation_records():
    records = of_kind(trained(*TERNARY), "eval")
    assert [r["step"] for r in records] == [6, 12]
    for r in records:
        assert set(r) == {"step", "kind", "loss", "tokens"} | {f"data/{name}" for name in (
            "loss", "loss_error", "bits_per_byte", "bits_per_byte_error", "tokens", "sequences")}
        assert r["loss"] == r["data/loss"] and r["data/sequences"] == 8 and r["data/tokens"] == 8 * 16
    assert records[1]["loss"] < records[0]["loss"]


def test_several_sets_are_evaluated_each(tmp_path):
    """Two sets of the same name, in different folders, weighted 3 to 1."""
    tokenizer = str(data() / "tokenizer.json")
    sets = [prepare_set(tmp_path / name / "set", seed=seed, tokenizer=tokenizer) for seed, name in enumerate("ab", 5)]
    config = tiny(f"data.sets={sets[0]}=3,{sets[1]}=1", "train.steps=1", "checkpoint.permanent_tokens=0")
    last = train(config, tmp_path / "run")["eval"]
    a, b = (last[f"{path}/loss"] for path in sets)
    assert a != b and last["loss"] == pytest.approx((3 * a + b) / 4)


def test_config_commit_and_data_are_on_record():
    workdir, config = trained(*TERNARY), tiny(*TERNARY)
    checkpoints = Checkpoints(workdir)
    # Every fifth and the last are saved, the newest is kept; the first past 500, 1000 and 1500 tokens stay for good.
    assert checkpoints.steps() == [4, 8, 12]
    fingerprint = Loader([(data(), 1.0)], split="train", T=16, B=8, V=304, seed=0).fingerprint
    for step in checkpoints.steps():
        record = record_of(checkpoints.path(step))
        assert configs.from_dict(record["config"]) == config
        assert record["tokens"] == step * TOKENS_PER_STEP and record["data_fingerprint"] == fingerprint
        assert record["git_commit"] and record["versions"]["jax"] == jax.__version__
    there = json.loads((workdir / "config.json").read_text())
    assert configs.from_dict(there["config"]) == config and there["data_fingerprint"] == fingerprint
    assert (workdir / "tokenizer.json").read_bytes() == (data() / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in workdir.iterdir()) == [
        "checkpoints", "config.json", "lock", "metrics.jsonl", "tokenizer.json"
    ]


def test_the_progress_line(tmp_path, capsys):
    """One line per interval where nobody watches, with what the issue of a run is told by."""
    config = tiny(
        *TERNARY, "train.steps=3", "metrics.every_steps=2", "evaluate.every_steps=0", "metrics.profile_at=2"
    )
    train(config, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("FloatLM run: ") and "ternary matrices" in lines[0] and "from scratch" in lines[0]
    assert lines[2].startswith("MFU = tokens/s x (6 P + 12 L N H T) / peak = ")
    assert lines[3] == "optimizer adamw: 0.30 MB of state, 64.00 bits per parameter"
    assert lines[4].startswith("parameters ")
    assert lines[-1].startswith("goodput ") and "checkpoint" in lines[-1] and "restart" not in lines[-1]
    shown = [line for line in lines if line.startswith("step ")]
    assert [line.split("/")[0] for line in shown] == ["step 1", "step 2", "step 3"]
    for part in (" tok ", "loss ", "lr ", "wd 0.1", " tok/s", "mfu ", "stall ", "eta ", "zeros ", "scale "):
        assert part in shown[1] + " "
    records = metrics.read(tmp_path / "run")
    assert {r["kind"] for r in records} == {"train", "weights", "event", "time"}  # no evaluation
    assert [(r["step"], r["name"]) for r in records if r["kind"] == "event"][0] == (2, "profile")
    assert len(list((tmp_path / "run").glob("profile/plugins/profile/*/*.xplane.pb"))) == 1  # closed at the end


# Steps that are not finite


def test_too_many_steps_that_are_not_finite_end_the_run(tmp_path):
    workdir = tmp_path / "run"
    config = tiny("model.init_std=1e30", "train.max_skipped=3", "train.accumulate=1")
    with pytest.raises(UserError, match=r"3 steps in a row up to step 3 had a loss or gradient that is not finite "
                                        r"\(config.train.max_skipped=3\); the last checkpoint is of step 0"):
        train(config, workdir)
    records = metrics.read(workdir)
    skipped = [r for r in records if r.get("name") == "step skipped: not finite"]
    assert [r["step"] for r in skipped] == [1, 2, 3]
    assert "grad_norm" in skipped[0]["nonfinite"] or "loss" in skipped[0]["nonfinite"]
    assert [r["skipped"] for r in records if r["kind"] == "train"] == [1, 2]


def test_a_run_without_data():
    with pytest.raises(UserError, match="config.data.sets is empty; name prepared sets"):
        train(Config(), "never made")
