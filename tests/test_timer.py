"""The timer charges every moment to one phase."""

import time

import pytest

from spectra_jax.timer import Timer


def test_timer_charges_each_moment_to_one_phase():
    begin = time.perf_counter()
    timer = Timer({"train": 100.0})
    with timer.phase("compile"):
        time.sleep(0.05)
    with timer.phase("eval"):
        time.sleep(0.02)
        with timer.phase("stall"):
            time.sleep(0.05)
    time.sleep(0.02)
    seconds = timer.seconds
    assert 100.14 < sum(seconds.values()) <= 100 + time.perf_counter() - begin
    assert seconds["compile"] >= 0.05 and seconds["stall"] >= 0.05 and seconds["eval"] >= 0.02
    assert seconds["train"] >= 100.02 and seconds["checkpoint"] == 0
    with pytest.raises(ValueError, match="phase 'lunch'"), timer.phase("lunch"):
        pass


def test_rates_leave_out_compile_and_eval():
    timer = Timer()
    assert timer.eta(10) is None
    for name in ("compile", "eval", "checkpoint"):
        with timer.phase(name):
            time.sleep(0.1)
    with timer.phase("stall"):
        time.sleep(0.05)
    time.sleep(0.15)
    timer.advance(steps=4, tokens=1000)
    before = timer.seconds  # the clock goes on between the calls, so rates lie between two readings
    rates, eta = timer.interval(), timer.eta(8)
    after = timer.seconds
    least, most = (s["train"] + s["stall"] for s in (before, after))
    assert 1000 / most <= rates.tokens_per_second <= 1000 / least
    assert before["stall"] / most <= rates.stall_share <= after["stall"] / least
    # ETA: wall time per step, evals and checkpoints included, compilation not.
    least, most = (sum(s.values()) - s["compile"] for s in (before, after))
    assert 2 * least <= eta <= 2 * most and least > 0.4
    assert timer.interval().tokens_per_second == 0
