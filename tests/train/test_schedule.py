"""Learning rate and weight decay at points worked out by hand, and the steps at which they jump."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.schema import Config, Schedule, Train
from spectra_jax.train.schedule import interventions, learning_rate, warmup_steps, weight_decay

LINEAR = Schedule(shape="linear", peak=2.4e-3, warmup=0.0)
BOTH = dataclasses.replace(LINEAR, lower_peak=True, lowered_peak=1.5e-3, remove_decay=True)


def rates(s: Schedule, steps: int) -> np.ndarray:
    """The rate of every step."""
    return np.asarray(jax.vmap(lambda step: learning_rate(s, steps, step))(jnp.arange(steps)), np.float64)


def decays(s: Schedule, steps: int, decay: float = 0.1) -> np.ndarray:
    """The weight decay of every step."""
    return np.asarray(jax.vmap(lambda step: weight_decay(s, decay, steps, step))(jnp.arange(steps)), np.float64)


def test_cosine_with_warmup():
    s = Schedule(shape="cosine", peak=4e-4, warmup=10.0, final=0.1)
    found = rates(s, 100) / 4e-4
    # Warm-up k of 10 is (k + 1)/10, and never above the cosine .1 + .9 (1 + cos(pi t))/2.
    by_hand = {
        0: 0.1, 4: 0.5, 8: 0.9, 9: 0.98213, 10: 0.1 + 0.45 * 1.9510565, 25: 0.1 + 0.45 * 1.7071068, 50: 0.55,
        75: 0.1 + 0.45 * 0.2928932, 90: 0.1 + 0.45 * 0.0489435, 99: 0.1 + 0.45 * 0.00049344,
    }
    for step, rate in by_hand.items():
        assert found[step] == pytest.approx(rate, rel=2e-5), step


def test_the_two_forms_of_warmup():
    assert warmup_steps(Schedule(warmup=0.01), 143_052) == 1430
    assert warmup_steps(Schedule(warmup=375.0), 95_368) == 375
    assert warmup_steps(Schedule(warmup=1.0), 1000) == 1
    assert warmup_steps(Schedule(warmup=0.0), 1000) == 0
    assert rates(Schedule(peak=1.0, warmup=0.0), 10)[0] == 1.0
    np.testing.assert_array_equal(rates(Schedule(peak=1.0, warmup=0.2), 20), rates(Schedule(peak=1.0, warmup=4.0), 20))


@pytest.mark.parametrize(
    ("changes", "by_hand"),
    [
        # peak (1 - t), then lowered_peak (1 - t) from one half on.
        ({}, {0: 2.4e-3, 3: 1.8e-3, 5: 1.4e-3, 6: 7.5e-4, 9: 3.75e-4, 11: 1.25e-4}),
        ({"lower_peak": False}, {0: 2.4e-3, 3: 1.8e-3, 5: 1.4e-3, 6: 1.2e-3, 9: 6e-4, 11: 2e-4}),
        # Straight from (0, peak) to (1/2, lowered peak) to (1, 0).
        ({"lowering": "continuous"}, {0: 2.4e-3, 3: 1.95e-3, 5: 1.65e-3, 6: 1.5e-3, 9: 7.5e-4, 11: 2.5e-4}),
        ({"lowering": "continuous", "lower_peak": False}, {0: 2.4e-3, 6: 1.2e-3, 11: 2e-4}),
        # A final rate of a quarter of the peak: 2.4e-3 (1/4 + 3/4 (1 - t)).
        ({"lower_peak": False, "final": 0.25}, {0: 2.4e-3, 6: 1.5e-3, 10: 9e-4}),
        ({"lowering": "continuous", "final": 0.25}, {6: 1.5e-3, 9: 1.05e-3}),
        ({"lower_at": 0.25}, {2: 2e-3, 3: 1.125e-3, 6: 7.5e-4}),
        # Warm-up of 4 steps: quarters of the peak, below the line while they rise.
        ({"warmup": 4.0}, {0: 6e-4, 1: 1.2e-3, 2: 1.8e-3, 3: 1.8e-3, 4: 1.6e-3, 6: 7.5e-4}),
    ],
)
def test_linear(changes, by_hand):
    found = rates(dataclasses.replace(BOTH, **changes), 12)
    for step, rate in by_hand.items():
        assert found[step] == pytest.approx(rate, rel=1e-6), step


def test_cosine_with_a_lowered_peak():
    s = dataclasses.replace(BOTH, shape="cosine")
    assert rates(s, 12)[[0, 4, 6, 8]] == pytest.approx([2.4e-3, 1.8e-3, 7.5e-4, 3.75e-4], rel=1e-6)


def test_weight_decay_is_removed_at_two_thirds():
    assert decays(BOTH, 12)[[0, 7, 8, 11]] == pytest.approx([0.1, 0.1, 0, 0])
    assert decays(dataclasses.replace(BOTH, remove_at=0.5), 12)[[5, 6]] == pytest.approx([0.1, 0])
    assert (decays(dataclasses.replace(BOTH, remove_decay=False), 12) == np.float32(0.1)).all()


@pytest.mark.parametrize("lowering", ["jump", "continuous"])
def test_each_intervention_is_a_switch_of_its_own(lowering):
    """Neither changes what comes before it, nor what the other does."""
    both, line = dataclasses.replace(BOTH, lowering=lowering), LINEAR
    only_peak = dataclasses.replace(both, remove_decay=False)
    only_decay = dataclasses.replace(both, lower_peak=False)
    np.testing.assert_array_equal(rates(both, 30), rates(only_peak, 30))
    np.testing.assert_array_equal(rates(only_decay, 30), rates(line, 30))
    np.testing.assert_array_equal(decays(both, 30), decays(only_decay, 30))
    np.testing.assert_array_equal(decays(only_peak, 30), decays(line, 30))
    if lowering == "jump":
        np.testing.assert_array_equal(rates(both, 30)[:15], rates(line, 30)[:15])


@pytest.mark.parametrize("steps", [7, 12, 100, 101, 320, 1000, 4099])
@pytest.mark.parametrize(
    ("lower_at", "remove_at"), [(1 / 2, 2 / 3), (0.07, 0.55), (0.29, 0.58), (0.58, 0.75), (0.3, 0.3)]
)
def test_interventions_name_the_steps_where_the_numbers_change(steps, lower_at, remove_at):
    s = dataclasses.replace(BOTH, lower_at=lower_at, remove_at=remove_at)
    lr, wd = rates(s, steps), decays(s, steps)
    # The line that a step lies on: its rate over what is left of training.
    peak = lr / (1 - np.arange(steps) / steps)
    np.testing.assert_allclose(np.minimum(abs(peak / 2.4e-3 - 1), abs(peak / 1.5e-3 - 1)), 0, atol=1e-3)
    lowered, removed = int(np.argmax(peak < 2e-3)), int(np.argmax(wd == 0))
    assert (peak[:lowered] > 2e-3).all() and (peak[lowered:] < 2e-3).all()
    assert (wd[:removed] > 0).all() and (wd[removed:] == 0).all()
    # The first whole step at or past the fraction as it was written, in exact arithmetic.
    for step, fraction in ((lowered, lower_at), (removed, remove_at)):
        exact = Fraction(fraction).limit_denominator(1000) * steps
        assert step == -(-exact.numerator // exact.denominator)
    config = Config(schedule=s, train=Train(steps=steps))
    expected = {lowered: "peak lowered", removed: "decay removed"}
    assert interventions(config) == (
        {lowered: "peak lowered, decay removed"} if lowered == removed else expected
    )


def test_interventions_of_a_schedule_without_any():
    assert interventions(Config(schedule=LINEAR, train=Train(steps=10))) == {}
    s = dataclasses.replace(BOTH, lower_peak=False)
    assert interventions(Config(schedule=s, train=Train(steps=9))) == {6: "decay removed"}
