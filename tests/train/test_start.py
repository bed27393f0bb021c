"""A run that begins with the parameters of another."""

import shutil
from pathlib import Path

import jax
import pytest
from helpers import (
    ROOT,
    STEPS,
    TERNARY,
    TINY,
    arguments,
    copy_of,
    data,
    prepare_set,
    same_bits,
    state_on_disk,
    tiny,
    trained,
)

from spectra_jax import cli
from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.metrics import read
from spectra_jax.prune.pipeline import prune
from spectra_jax.serve.pack import pack
from spectra_jax.sharding import make_mesh
from spectra_jax.train.loop import train
from spectra_jax.train.start import started
from spectra_jax.train.step import init_state
from spectra_jax.train.workdir import read_config

PRUNED = ("prune.criterion=l1", "prune.ratio=0.5")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A smaller run of the tiny one."""
    return prune(str(trained()), configs.override(tiny(), PRUNED), tmp_path_factory.mktemp("start") / "cut")


def test_the_first_state_has_the_other_runs_parameters():
    """On this run's mesh, in the bits that are on the disk; everything else is fresh."""
    config = tiny(f"train.start={trained()}@8", "mesh.model=2")
    with jax.set_mesh(make_mesh(config)):
        fresh = jax.jit(lambda key: init_state(config, key))(jax.random.key(0))
        state = started(config, dict(fresh))
        assert same_bits(state["parameters"], state_on_disk(trained(), 8)["parameters"])
        assert same_bits({**state, "parameters": fresh["parameters"]}, fresh) and int(state["step"]) == 0
        for new, old in zip(jax.tree.leaves(state["parameters"]), jax.tree.leaves(fresh["parameters"])):
            assert new.sharding == old.sharding
        assert started(tiny(), fresh) is fresh


def test_a_pruned_run_is_trained_on(pruned, tmp_path):
    """By configs/finetune.py; it is better after it, and resumes from itself."""
    pruned = copy_of(pruned, tmp_path / "cut")
    command = ["train", f"--config={ROOT}/configs/finetune.py:{pruned}", f"--workdir={tmp_path / 'tuned'}", *arguments([
        text for text in TINY if not text.startswith("model.")])]
    cli.run(command)
    config, losses = read_config(tmp_path / "tuned"), {
        record["step"]: record["loss"] for record in read(tmp_path / "tuned") if record["kind"] == "train"}
    assert config.model == read_config(pruned).model and config.data.sets == (str(data()),)
    assert (config.train.start, config.name) == (str(pruned), "run-tuned")
    assert losses[1] < 4.5 and losses[STEPS] < losses[1]  # random parameters begin at ln 304 = 5.7
    shutil.rmtree(pruned)  # it has done its part
    shutil.rmtree(tmp_path / "tuned" / "checkpoints" / str(STEPS))
    again = train(config, tmp_path / "tuned")["train"]
    assert (again["step"], again["loss"]) == (STEPS, losses[STEPS])


def test_what_a_run_cannot_begin_with(pruned, tmp_path):
    """Nothing is written of a run that is refused."""
    other = prepare_set(tmp_path / "other", tokenizer="train:290", seed=3)
    packed = tmp_path / "packed"
    pack(str(trained(*TERNARY)), packed)
    for overrides, message in (
        ((f"train.start={tmp_path / 'none'}",), "none holds no run"),
        ((f"train.start={trained()}@7",), r"no checkpoint of step 7; it has \[4, 8, "),
        ((f"train.start={packed}", *TERNARY), "holds codes and scales, which cannot be trained"),
        ((f"train.start={pruned}",), r"mlp.down.w: the checkpoint has float32\[2, 32, 32\], the config asks for .*64"),
        ((f"train.start={trained()}", f"data.sets={other}"), "tokenized with another tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            train(tiny(*overrides), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_ternary_run_begins_with_a_float_one(tmp_path):
    """Latent weights are those of the float run, so its first loss is far from that of random ones."""
    last = train(tiny(f"train.start={trained()}", *TERNARY, "train.steps=1"), tmp_path / "tri")
    assert last["train"]["loss"] < 5
