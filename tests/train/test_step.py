"""One optimizer step: the numbers it gives, microbatches, meshes, and what a step that is not finite leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import T, drawn, first_state, on_mesh, same_bits, tiny

from spectra_jax.schema import Config
from spectra_jax.sharding import batch_sharding
from spectra_jax.stored import abstract
from spectra_jax.train.schedule import learning_rate, weight_decay
from spectra_jax.train.step import init_state, make_step

# Loss and gradient norm of the first step, and the root mean square of all changes of parameters after three, from
# `golden_steps` below. They hold the mathematics of a step in place. A change that is meant to alter it (another
# default, another formula) replaces them, and says so in its commit; a change that is not must leave them.
GOLDEN = {
    "float": (6.3191371, 2.3148506, 0.014543805),
    "ternary": (6.2050467, 2.0495374, 0.014497308),
    "binary": (6.1438189, 2.0959644, 0.014511412),
    "bitnet158": (6.2805767, 2.8013113, 0.014488455),
}


@functools.cache
def records(seed: int, rows: int = 8, low: int = 0, high: int = 300) -> np.ndarray:
    """Records (rows, T + 1) of ids in [low, high)."""
    return np.random.RandomState(seed).randint(low, high, (rows, T + 1)).astype(np.int32)


@functools.cache
def compiled(config: Config):
    """The jitted step: compiling it is what these tests spend their time on."""
    return jax.jit(make_step(config))


def run(config: Config, batches: list[np.ndarray], state: dict | None = None) -> tuple[dict, list[dict]]:
    """The state after these batches, and the metrics of each."""
    state, metrics = first_state(config) if state is None else state, []
    step = compiled(config)
    for batch in batches:
        state, m = step(state, batch)
        metrics.append(jax.tree.map(float, jax.device_get(m)))
    return state, metrics


def golden_steps(weight: str) -> tuple[float, float, float]:
    """The three numbers of GOLDEN."""
    # Weights and batches from numpy's frozen stream: another version of JAX draws other numbers.
    config = tiny(f"model.weight={weight}", "model.scale_shards=2")
    before = first_state(config)["parameters"]
    after, metrics = run(config, [records(k) for k in range(3)])
    pairs = zip(jax.tree.leaves(after["parameters"]), jax.tree.leaves(before))
    change = np.concatenate([np.ravel(np.asarray(a, np.float64) - np.asarray(b)) for a, b in pairs])
    return metrics[0]["loss"], metrics[0]["grad_norm"], float(np.sqrt(np.mean(change**2)))


@pytest.mark.parametrize("weight", GOLDEN)
def test_golden_step(weight):
    found = golden_steps(weight)
    assert found == pytest.approx(GOLDEN[weight], rel=1e-5), (
        f"the first steps of {weight} gave {found}, stored are {GOLDEN[weight]}: the mathematics of a step changed. "
        "If that is meant, store the new numbers and say why in the commit"
    )


def test_the_numbers_of_a_step():
    config = tiny("schedule.remove_decay=True", "schedule.remove_at=0.1", "schedule.lower_peak=True")
    state, metrics = run(config, [records(k) for k in range(3)])
    assert set(metrics[0]) == {"loss", "grad_norm", "lr", "weight_decay", "skipped", "skipped_in_a_row"}
    for k, m in enumerate(metrics):
        assert m["lr"] == learning_rate(config.schedule, config.steps, k)
        assert m["weight_decay"] == weight_decay(config.schedule, 0.1, config.steps, k)
    assert [m["weight_decay"] for m in metrics] == pytest.approx([0.1, 0.1, 0.0])
    assert int(state["step"]) == 3 and int(state["skipped"]) == 0


def test_init_state():
    """Deviations as the config says; gains one; everything else zero."""
    config = tiny("model.init_std=0.03")
    state = jax.jit(functools.partial(init_state, config))(jax.random.key(0))
    p = state["parameters"]
    for w, std in (
        (p["embedding"], 0.03), (p["head"], 0.03), (p["blocks"]["attention"]["q"]["w"], 0.03),
        (p["blocks"]["mlp"]["gate"]["w"], 0.03),
        (p["blocks"]["attention"]["o"]["w"], 0.015), (p["blocks"]["mlp"]["down"]["w"], 0.015),  # 1/sqrt(2 L), L = 2
    ):
        assert float(jnp.std(w)) == pytest.approx(std, rel=0.1) and abs(float(jnp.mean(w))) < 0.1 * std
    assert (p["norm"]["gain"] == 1).all() and (p["blocks"]["mlp_norm"]["gain"] == 1).all()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves({**state, "parameters": ()}))
    other = jax.jit(functools.partial(init_state, config))(jax.random.key(1))
    assert not np.array_equal(p["embedding"], other["parameters"]["embedding"])
    layers = p["blocks"]["mlp"]["up"]["w"]
    assert not np.array_equal(layers[0], layers[1])


def test_accumulation_changes_nothing_but_rounding():
    batches, results = [records(0, rows=8), records(1, rows=8)], {}
    for microbatches in (1, 2, 4):
        state, metrics = run(tiny("model.weight=ternary", f"train.accumulate={microbatches}"), batches)
        results[microbatches] = metrics, state["parameters"]
    (one, p1) = results.pop(1)
    for metrics, parameters in results.values():
        for a, b in zip(metrics, one):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        # Adam divides by the size of the gradient: where that is about 0, rounding shows.
        far = [np.mean(np.abs(a - b) > 1e-5) for a, b in zip(jax.tree.leaves(parameters), jax.tree.leaves(p1))]
        assert max(far) < 2e-3


@pytest.mark.parametrize(("data", "model"), [(4, 2), (2, 4)])
def test_meshes_give_the_same_numbers(data, model):
    """Scales per shard included: 2 of them, whatever the mesh."""
    config = tiny("model.weight=ternary", "model.scale_shards=2", "train.accumulate=2", "data.batch=16", "model.K=4")
    batches = [records(k, rows=16) for k in range(3)]
    expected, one = one_device(config)
    start = first_state(config)
    config, mesh = on_mesh(config, 1, data, model)
    with jax.set_mesh(mesh):
        like = abstract(jax.eval_shape(lambda: init_state(config, jax.random.key(0))), mesh)
        state = jax.tree.map(lambda leaf, where: jax.device_put(leaf, where.sharding), start, like)
        placed = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]
        state, metrics = run(config, placed, state)
        up = state["parameters"]["blocks"]["mlp"]["up"]["w"]
        assert up.sharding.shard_shape(up.shape) == (2, 32 // data, 64 // model)
    for a, b in zip(metrics, expected):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-5)
    far = [np.mean(np.abs(a - np.asarray(b)) > 1e-4) for a, b in zip(
        jax.tree.leaves(one), jax.tree.leaves(jax.device_get(state["parameters"])))]
    assert max(far) < 2e-3


@functools.cache
def one_device(config: Config) -> tuple[list[dict], dict]:
    """Metrics and final parameters of three steps without a mesh."""
    state, metrics = run(config, [records(k, rows=16) for k in range(3)])
    return metrics, jax.device_get(state["parameters"])


@pytest.mark.parametrize("K", [1, 4])
def test_one_sequence_on_a_mesh(K):
    """Where B or K is 1, a reshape may lose the axis that the dim is sharded over."""
    plain = tiny("data.batch=1", f"model.K={K}")
    batch = records(0, rows=1)
    config, mesh = on_mesh(plain, 1, 1, 1)
    with jax.set_mesh(mesh):
        shapes = abstract(jax.eval_shape(functools.partial(init_state, config), jax.random.key(0)), mesh)
        state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), first_state(config), shapes)
        _, metrics = jax.jit(make_step(config))(state, jax.device_put(batch, batch_sharding(mesh)))
    _, (expected,) = run(plain, [batch])
    assert float(metrics["loss"]) == pytest.approx(expected["loss"], rel=1e-6)


def test_a_step_takes_its_own_result_in_place():
    """So it is compiled once for a whole run, and no device holds the state twice."""
    config, mesh = on_mesh(tiny("data.batch=16"), 2, 2, 2)
    with jax.set_mesh(mesh):
        like = abstract(jax.eval_shape(lambda: init_state(config, jax.random.key(0))), mesh)
        batch = jax.ShapeDtypeStruct((16, T + 1), jnp.int32, sharding=batch_sharding(mesh))
        step = jax.jit(make_step(config), donate_argnums=0).lower(like, batch).compile()
        given, given_back = jax.tree.leaves_with_path(like), jax.tree.leaves_with_path(step.out_info[0])
        assert [(path, x.shape, x.dtype) for path, x in given] == [(path, x.shape, x.dtype) for path, x in given_back]
        where = jax.tree.leaves(step.output_shardings[0])
        assert all(x.sharding.is_equivalent_to(s, x.ndim) for (_, x), s in zip(given, where, strict=True))
        held = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for _, x in given)
        assert step.memory_analysis().alias_size_in_bytes >= held, "donated, every byte of it"


def test_a_step_that_is_not_finite_changes_nothing():
    """An infinite row of the embedding that only one batch reads."""
    config = tiny("optimizer.no_decay=norm,embedding", "schedule.shape=linear")
    clean, poisoned = records(0, high=200), records(1, high=200)
    poisoned[3, 5] = 250
    start = first_state(config)
    start["parameters"]["embedding"] = start["parameters"]["embedding"].at[250].set(jnp.inf)
    # Adam's moments are not zero, so that a decay of them would show.
    start["optimizer"] = jax.tree.map(
        lambda x: jnp.abs(drawn(x)) if x.ndim else x, start["optimizer"]
    )
    after, metrics = run(config, [poisoned, poisoned, clean, poisoned], start)
    one, _ = run(config, [poisoned], start)
    assert same_bits(one["parameters"], start["parameters"]) and same_bits(one["optimizer"], start["optimizer"])
    assert not np.isfinite([m["loss"] for m in metrics])[[0, 1, 3]].any() and np.isfinite(metrics[2]["loss"])
    assert [m["skipped"] for m in metrics] == [1, 2, 2, 3]
    assert [m["skipped_in_a_row"] for m in metrics] == [1, 2, 0, 1]
    # The schedule goes on: skipped steps have had their rate.
    assert [m["lr"] for m in metrics] == [float(learning_rate(config.schedule, 12, k)) for k in range(4)]
    # The finite step does what it would have done had the others never been.
    alone, _ = run(config, [clean], {**start, "step": jnp.asarray(2, jnp.int32)})
    assert same_bits(alone["parameters"], after["parameters"]) and same_bits(alone["optimizer"], after["optimizer"])
    assert np.isinf(after["parameters"]["embedding"][250]).all()
