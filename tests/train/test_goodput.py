"""Where the wall time of a run went: sums by hand over kills and restarts. Those of a real run: test_loop.py."""

import jax
import pytest
from helpers import ROOT
from trainer import start

from spectra_jax import metrics
from spectra_jax.train import goodput

SPENT = {"compile": 10.0, "train": 70.0, "stall": 5.0, "eval": 6.0, "checkpoint": 4.0, "start": 5.0, "lost": 0.0}


def record(step: int, clock: float, *, restarts: int = 0, redone: int = 0, steps: int = 100, **spent: float) -> dict:
    """A time record as it comes out of metrics.jsonl."""
    seconds = {f"seconds/{name}": value for name, value in (SPENT | spent).items()}
    counts = {"steps": steps, "restarts": restarts, "redone": redone}
    return {"step": step, "kind": "time", "clock": clock} | counts | seconds


def taken(*numbers: int) -> list[dict]:
    """Records of training steps."""
    return [{"step": step, "kind": "train", "loss": 1.0} for step in numbers]


def test_the_first_process():
    past = goodput.past([], 0, began=1000.0)
    assert past == goodput.Past(1000.0) and past.at(1007.0) == {"start": 7.0, "lost": 0.0}


def test_a_kill_between_two_checkpoints():
    """100 s up to the checkpoint of step 40; killed after step 52; the next process begins at 160 s."""
    records = [record(0, 5.0, train=0.0), *taken(39, 40), record(40, 100.0), *taken(41, 52)]
    past = goodput.past(records, 40, began=160.0)
    assert (past.restarts, past.redone) == (1, 12)
    seconds = past.at(167.0)
    assert seconds == SPENT | {"start": 12.0, "lost": 60.0} and sum(seconds.values()) == 167


def test_processes_that_were_killed_before_they_saved_anything(tmp_path):
    """Two of them, through the file: all of their time but for the start of each is lost."""
    nothing = dict.fromkeys(SPENT, 0.0)
    for began, lost, redone in ((0.0, 0.0, 0), (50.0, 45.0, 9), (70.0, 63.0, 18)):
        records = metrics.read(tmp_path) if began else []
        past = goodput.past(records, 0, began)
        seconds = nothing | past.at(began + (5.0 if began == 0 else 2.0))
        assert seconds["lost"] == lost and past.redone == redone and past.restarts == (began > 0) + (began > 50)
        with metrics.MetricsWriter(tmp_path, resume_step=0) as writer:
            writer.write(0, "time", goodput.time_record(past, seconds, sum(seconds.values()), 100))
            for step in range(1, 10):
                writer.write(step, "train", {"loss": 1.0})
    assert sum(seconds.values()) == 72 and seconds["start"] == 9


def test_one_that_falls_back_behind_a_damaged_checkpoint():
    """The restarts that are on record beyond the restored step still count, the time since that step is lost."""
    records = [record(20, 60.0), record(40, 100.0), record(40, 130.0, restarts=1, redone=3, lost=25.0), *taken(41, 45)]
    past = goodput.past(records, 20, began=200.0)
    assert (past.restarts, past.redone, past.seconds["lost"]) == (2, 28, 140.0)


def test_a_finished_run_that_is_trained_for_longer():
    """The pause is no time of the run; without time records, of an older version, it begins now."""
    records = [*taken(100), record(100, 100.0, restarts=2)]
    assert goodput.past(records, 100, began=9e9) == goodput.Past(9e9, SPENT, restarts=2)
    assert goodput.past(taken(100), 100, began=9e9) == goodput.Past(9e9)


def test_the_line():
    whole = goodput.time_record(goodput.Past(0.0), SPENT | {"lost": 100.0}, 200.0, 100)
    assert whole["goodput"] == 0.35
    shares = "start 2.5%, compile 5.0%, stall 2.5%, eval 3.0%, checkpoint 2.0%"
    assert goodput.line(whole) == f"goodput 35.0% of 3m20s: {shares}"
    lost = ", lost to 1 restart (1 step redone) 50.0%"
    assert goodput.line(whole | {"restarts": 1, "redone": 1}).endswith(lost)
    assert goodput.line(whole | {"restarts": 3, "redone": 0}).endswith(", lost to 3 restarts 50.0%")


def test_a_single_process_has_no_worst_one():
    assert jax.process_count() == 1 and goodput.worst_stall(0.5, lambda number: number) == {}


SLOW = f"""
import os, sys, time
from spectra_jax.data.loader import RecordReader

read = RecordReader.__getitem__
def slowly(self, index):
    time.sleep(0.4 * int(os.environ["JAX_PROCESS_ID"]))
    return read(self, index)
RecordReader.__getitem__ = slowly
sys.path.insert(0, "{ROOT}")
from spectra_jax.cli import main
main("train")
"""


@pytest.mark.slow
def test_the_process_that_waits_for_its_data_is_named(tmp_path):
    """The second of two reads 4 records in 1.6 s, longer than a step takes; tracing on the first disturbs nothing."""
    workdir = tmp_path / "run"
    run = start(
        workdir, "train.steps=8", "metrics.every_steps=2", "metrics.profile_at=5", "metrics.profile_steps=2",
        processes=2, devices=2, wrap=("-c", SLOW),
    )
    ended = run.end()
    assert [status for status, _ in ended] == [0, 0], ended
    records = [r for r in metrics.read(workdir) if r["kind"] == "train"]
    assert "stall_max" not in records[0]  # no interval before
    assert all(r["stall_process"] == 1 and 0.3 < r["stall_max"] <= 1 for r in records[2:]), records
    assert all(r["stall"] < 0.1 for r in records[2:]), records  # the first waits for the other, not for its data
    assert "worst " in ended[0][1] and "goodput " in ended[0][1] and "goodput" not in ended[1][1]
    assert len(list(workdir.glob("profile/plugins/profile/*/*.xplane.pb"))) == 1
