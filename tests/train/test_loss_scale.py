"""Training in float16: the scale against PyTorch's, the loss's gradients against float64, and real steps and runs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import first_state, same_bits, state_on_disk, tiny
from test_loss import inputs, oracle
from test_step import records, run

from spectra_jax.metrics import read
from spectra_jax.schema import Config, Train
from spectra_jax.train.loop import train
from spectra_jax.train.loss import mean_loss
from spectra_jax.train.loss_scale import adapt, init_scaling

# One config for all real steps: compiling it is what they spend their time on.
SMALL = ("train.steps=40", "model.attention_blocks=1", "train.loss_chunks=1")
FLOAT16 = (*SMALL, "model.compute_dtype=float16", "train.loss_scale_window=8")


def float16_run(scale: float = 2.0**16) -> tuple[Config, dict]:
    """That config and a first state with this scale."""
    config = tiny(*FLOAT16)
    return config, {**first_state(config), "scaling": init_scaling(replace(config.train, loss_scale=scale))}


def scales(train: Train, norms: list[float], loss: float = 1.0) -> tuple[list[float], list[bool]]:
    """The scale after steps with these gradient norms, and which of them it is to blame for."""
    scaling, found, blamed = init_scaling(train), [], []
    step = jax.jit(adapt, static_argnums=0)
    for norm in norms:
        scaling, blame = step(train, scaling, jnp.float32(loss), jnp.float32(norm))
        found.append(float(scaling["scale"]))
        blamed.append(bool(blame))
    return found, blamed


def test_against_torch():
    """torch.amp.GradScaler by its public functions, which has no least scale."""
    rng, weight = np.random.RandomState(0), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler, expected = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=5), []
    norms = np.where(rng.uniform(size=200) < 0.15, np.inf, 1.0)
    for norm in norms:
        scaler.scale(weight.sum()).backward()
        weight.grad = torch.tensor([norm], dtype=torch.float32)
        scaler.step(optimizer)
        scaler.update()
        expected.append(scaler.get_scale())
    found, blamed = scales(Train(loss_scale=2.0**20, loss_scale_min=2.0**-60, loss_scale_window=5), list(norms))
    assert found == expected and len(set(found)) > 8
    assert blamed == list(np.isinf(norms))


def test_at_its_least_the_scale_stays_and_takes_no_blame():
    found, blamed = scales(Train(loss_scale=8.0, loss_scale_min=3.0), [np.inf, np.nan, np.inf, 1.0, np.inf])
    assert found == [4.0, 3.0, 3.0, 3.0, 3.0] and blamed == [True, True, False, False, False]


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_loss_that_is_not_finite_is_no_fault_of_the_scale(bad):
    train = Train(loss_scale=8.0, loss_scale_window=3)
    assert scales(train, [1.0, 1.0]) == ([8.0, 8.0], [False, False])
    assert scales(train, [np.nan] * 4, loss=bad) == ([8.0] * 4, [False] * 4)


@pytest.mark.parametrize("chunks", [1, 4])
def test_small_probabilities_outlive_float16(chunks):
    """Of an id that is never the target: e^-12 of the others' probability, over 96 targets, is 0 in float16."""
    hidden, head, targets = inputs(0.3)
    hidden[..., 0], head[:, 0], head[0, 0] = 1.0, 0.0, -12.0
    targets = np.maximum(targets, 1)
    hidden, head = hidden.astype(np.float16), head.astype(np.float16).astype(np.float32)
    losses, d_hidden, d_head = oracle(hidden.astype(np.float32), head, targets)
    assert 0 < np.max(np.abs(d_head[:, 0])) < 1e-5

    def gradients(scale):
        run = jax.value_and_grad(lambda x, w: mean_loss(x, w, jnp.asarray(targets), chunks, scale=scale), (0, 1))
        return jax.jit(run)(hidden, head)

    loss, (_, plain) = gradients(None)
    scale = 2.0**16
    same, (dx, dw) = gradients(jnp.float32(scale))
    assert loss == same == pytest.approx(losses.mean(), rel=1e-5)
    assert (np.asarray(plain)[:, 0] == 0).all()
    assert dx.dtype == jnp.float16 and dw.dtype == jnp.float32
    np.testing.assert_allclose(dw[:, 0] / scale, d_head[:, 0], rtol=2e-3, atol=1e-3 * np.max(np.abs(d_head[:, 0])))
    np.testing.assert_allclose(dw / scale, d_head, rtol=2e-3, atol=1e-3 * np.max(np.abs(d_head)))
    np.testing.assert_allclose(
        np.asarray(dx, np.float64) / scale, d_hidden, rtol=2e-3, atol=1e-3 * np.max(np.abs(d_hidden))
    )


def test_near_a_run_in_float32():
    """Ten bits of a mantissa; and the scale grows after every eight steps that it fitted."""
    batches = [records(k, high=30) for k in range(20)]
    config, start = float16_run()
    state, metrics = run(config, batches, start)
    expected_state, expected = run(tiny(*SMALL), batches)
    losses, exact = ([m["loss"] for m in run] for run in (metrics, expected))
    assert exact[-1] < exact[0] - 2
    np.testing.assert_allclose(losses, exact, atol=6e-3)
    assert metrics[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-3)
    assert [m["loss_scale"] for m in metrics] == [2.0**16] * 8 + [2.0**17] * 8 + [2.0**18] * 4
    assert metrics[-1]["skipped"] == 0
    assert set(state) - set(expected_state) == {"scaling"} and "loss_scale" not in expected[0]


def test_a_scale_that_is_too_high_is_halved_until_it_fits():
    config, start = float16_run(2.0**30)
    before, metrics = run(config, [records(k) for k in range(10)], start)
    assert [m["loss_scale"] for m in metrics] == [2.0 ** (30 - k) for k in range(10)]
    assert metrics[-1]["skipped"] == 10 and not any(m["skipped_in_a_row"] for m in metrics)
    assert np.isfinite([m["loss"] for m in metrics]).all() and not np.isfinite([m["grad_norm"] for m in metrics]).any()
    assert same_bits(before["parameters"], start["parameters"]) and same_bits(before["optimizer"], start["optimizer"])
    after, metrics = run(config, [records(k) for k in range(10, 16)], before)
    skipped = [m["skipped"] for m in metrics]
    assert 10 <= skipped[-1] < 14 and skipped[-2] == skipped[-1]
    assert metrics[-1]["loss_scale"] == 2.0 ** (30 - skipped[-1]) and np.isfinite(metrics[-1]["grad_norm"])
    assert not same_bits(after["parameters"], before["parameters"])


def test_a_forward_pass_that_fails_counts_and_leaves_the_scale():
    (config, start), poisoned = float16_run(), records(1, high=200).copy()
    poisoned[3, 5] = 250
    start["parameters"]["embedding"] = start["parameters"]["embedding"].at[250].set(1e6)  # infinite in float16
    _, metrics = run(config, [poisoned, poisoned, records(0, high=200)], start)
    assert [m["skipped_in_a_row"] for m in metrics] == [1, 2, 0]
    assert {m["loss_scale"] for m in metrics} == {2.0**16}


def test_a_run_outlives_more_overflows_than_it_may_skip(tmp_path):
    """Through the loop: 2^26 is too high by more than two halvings; scale and count come to the disk."""
    config = tiny(
        "model.compute_dtype=float16", f"train.loss_scale={2.0**26}", "train.max_skipped=2", "evaluate.every_steps=0",
        "model.L=1", "model.attention_blocks=1", "train.loss_chunks=1",
        "checkpoint.every_steps=100", "checkpoint.permanent_tokens=0",
    )
    last = train(config, tmp_path)["train"]
    records = [record for record in read(tmp_path) if record["kind"] == "train"]
    assert [r["loss_scale"] for r in records[:3]] == [2.0**26, 2.0**25, 2.0**24]
    assert 2 < last["skipped"] < 11 and last["skipped_in_a_row"] == 0 and last["loss"] < records[0]["loss"]
    stored = state_on_disk(tmp_path, config.steps)["training"]["scaling"]
    assert stored["scale"] == last["loss_scale"] and stored["good_steps"] == config.steps - last["skipped"]
