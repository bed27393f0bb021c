"""Spikes: what is skipped, against statistics by numpy in float64; that nothing poisons the window; a real step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import same_bits, tiny
from test_step import records, run

from spectra_jax.schema import Train
from spectra_jax.train.spikes import init_window, judge


def verdicts(train: Train, losses: list[float], norms: list[float] | None = None) -> list[bool]:
    """Which of these steps are taken."""
    window, found, step = init_window(train), [], jax.jit(judge, static_argnums=0)
    for loss, norm in zip(losses, norms or [1.0] * len(losses)):
        taken, window = step(train, window, jnp.float32(loss), jnp.float32(norm))
        found.append(bool(taken))
    return found


@pytest.mark.parametrize(("size", "sigma"), [(8, 3.0), (16, 2.0), (5, 6.0)])
def test_against_numpy(size, sigma):
    rng = np.random.RandomState(size)
    values = rng.standard_normal((120, 2)) * [0.1, 0.5] + [3.0, 2.0]
    values[rng.choice(120, 12), rng.randint(0, 2, 12)] += rng.uniform(1, 30, 12)
    seen, expected = [], []
    for value in np.float32(values).astype(np.float64):
        recent = np.array(seen[-size:])
        limit = recent.mean(0) + sigma * recent.std(0) if len(seen) >= size else np.inf
        expected.append(bool((value <= limit).all()))
        seen.append(np.minimum(value, limit))
    assert 0 < expected.count(False) < 40
    assert verdicts(Train(skip_sigma=sigma, skip_window=size), *values.T.tolist()) == expected


def test_none_before_the_window_is_full_and_none_unless_asked():
    losses = [3.0, 3.1, 2.9, 500.0]
    assert verdicts(Train(skip_sigma=6.0, skip_window=4), losses) == [True] * 4
    assert verdicts(Train(skip_sigma=6.0, skip_window=3), losses) == [True] * 3 + [False]
    assert verdicts(Train(skip_window=3), losses) == [True] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped_and_leaves_the_window_alone(bad):
    train, losses = Train(skip_sigma=6.0, skip_window=4), [3.0, 3.1, 2.9, 3.0]
    mixed = [3.0, bad, 3.1, 2.9, bad, bad, 3.0, bad, 3.05, 9.0]
    assert verdicts(train, mixed) == [True, False, True, True, False, False, True, False, True, False]
    assert verdicts(train, [1.0] * len(mixed), mixed) == verdicts(train, mixed)
    assert verdicts(Train(), [*losses, bad]) == [True] * 4 + [False]
    window, after = init_window(train), None
    for loss in (3.0, bad):
        _, after = judge(train, window if after is None else after, jnp.float32(loss), jnp.float32(1.0))
        window = after if loss == 3.0 else window
    assert same_bits(window, after)


def test_a_spike_does_not_hide_the_next_and_a_new_level_is_followed():
    train = Train(skip_sigma=4.0, skip_window=8)
    before = [3.0, 3.1] * 8
    assert verdicts(train, [*before, 1e30, 9.0, 9.0])[len(before):] == [False] * 3
    followed = verdicts(train, before + [4.0, 4.1] * 10)[len(before):]
    assert not followed[0] and all(followed[10:])


def test_a_real_step_that_is_a_spike_changes_no_weight():
    """Records of one token, which are learnt at once, and then random ones."""
    config = tiny("train.skip_sigma=5.0", "train.skip_window=6", "schedule.warmup=0.0", "train.steps=40")
    easy = [records(k, low=7, high=9) for k in range(20)]
    state, metrics = run(config, easy)
    assert metrics[-1]["skipped"] == 0 and metrics[-1]["loss"] < 1.5
    after, (spike,) = run(config, [records(99)], state)
    assert spike["loss"] > 4 and (spike["skipped"], spike["skipped_in_a_row"]) == (1, 1)
    assert same_bits(after["parameters"], state["parameters"]) and same_bits(after["optimizer"], state["optimizer"])
    again, (fine,) = run(config, [records(3, low=7, high=9)], after)
    assert (fine["skipped"], fine["skipped_in_a_row"]) == (1, 0)
    assert not same_bits(again["parameters"], after["parameters"])
