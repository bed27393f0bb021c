"""Optimizer states in 8 bits: codes and steps of bitsandbytes, the same on meshes, and what they take and cost."""

import functools
import re
import subprocess
import sys
from dataclasses import replace

import bitsandbytes as bnb
import bitsandbytes.backends.cpu.ops as bnb_cpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import ROOT, T, environment, first_state, on_mesh, tiny
from jax.sharding import NamedSharding

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import count
from spectra_jax.plan import estimate
from spectra_jax.schema import Optimizer
from spectra_jax.sharding import AXES, TYPES, P, batch_sharding
from spectra_jax.stored import abstract
from spectra_jax.train.blockwise_state import Blockwise, dequantize, quantize
from spectra_jax.train.describe import optimizer_line
from spectra_jax.train.dynamic_map import SIGNED, UNSIGNED, DynamicMap
from spectra_jax.train.optimizer import DIRECTIONS, apply_updates, make_optimizer, state_bytes
from spectra_jax.train.step import init_state, make_step

FIELDS = {"adamw8bit": ("mu", "nu"), "lion8bit": ("mu",), "momentum8bit": ("trace",)}
NAMES = tuple(FIELDS)
SHAPE = (24, 512)


def drawn(shape, seed=0):
    """Numbers of many sizes, with a row of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))
    x[..., 1, :] = 0
    return x.astype(np.float32)


# The stored form


@pytest.mark.parametrize("kind", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
@pytest.mark.parametrize("n", [512, 640, 192, 300, 37])
def test_blocks_of_a_row(n, kind):
    """256 numbers, and what is left of the row: by a loop in float64."""
    x = drawn((2, 3, n))
    x = x if kind.signed else x**2
    x[0, 0, :256] *= 1e-30
    found = jax.jit(quantize, static_argnums=1)(x, kind)
    assert found.absmax.shape == (2, 3, -(-n // 256)) and found.codes.shape == x.shape
    expanded = np.asarray(jax.jit(dequantize, static_argnums=1)(found, kind))
    for row in np.ndindex(2, 3):
        for b, start in enumerate(range(0, n, 256)):
            where = (*row, slice(start, start + 256))
            absmax = np.abs(x[where]).max()
            assert found.absmax[(*row, b)] == absmax
            if absmax == 0:
                assert (found.codes[where] == 0).all() and (expanded[where] == 0).all()
                continue
            scaled = np.clip(x[where] * (np.float32(1) / absmax), -1, 1).astype(np.float64)
            np.testing.assert_array_equal(found.codes[where], nearest(scaled, kind.values))
            np.testing.assert_array_equal(expanded[where], kind.values[found.codes[where]] * absmax)


def nearest(x, values):
    """In float64, the lower of two."""
    return np.argmin(np.abs(x[..., None].astype(np.float64) - values.astype(np.float64)), axis=-1)


def test_what_is_too_small_for_a_reciprocal_is_zero():
    found = jax.jit(quantize, static_argnums=1)(np.full((1, 256), 1e-39, np.float32), UNSIGNED)
    assert not np.any(found.codes) and not np.any(found.absmax)


# Beside bitsandbytes


def in_bins(kind: DynamicMap, x):
    """Its search on CPUs: the value nearest to the middle of one of 65,536 bins."""
    bins = np.trunc((np.float32(1) + np.asarray(x)) / 2 * np.float32(65535) + np.float32(0.5))
    return jnp.asarray(nearest(np.clip(bins / 65535 * 2 - 1, -1, 1), kind.values), jnp.uint8)


def exactly(numbers, code, absmax, out, block):
    """Its search on GPUs, in the place of the one on CPUs."""
    blocks = numbers.reshape(-1, block)
    absmax.copy_(blocks.abs().amax(1))
    x = (blocks * (1 / absmax[:, None])).clamp(-1, 1).double()
    found = torch.searchsorted((code[1:].double() + code[:-1].double()) / 2, x)
    out.copy_(torch.where(absmax[:, None] == 0, 0, found).reshape(out.shape))


def peer(name, parameter, o, rate, decay):
    betas = (o.b1, o.b2)
    if name == "adamw8bit":
        return bnb.optim.AdamW8bit([parameter], lr=rate, betas=betas, eps=o.eps, weight_decay=decay)
    if name == "lion8bit":
        return bnb.optim.Lion8bit([parameter], lr=rate, betas=betas, weight_decay=decay)
    return bnb.optim.SGD8bit([parameter], lr=rate, momentum=o.b1)  # its decay is no decoupled one


@pytest.mark.parametrize("search", ["bins", "exact"])
@pytest.mark.parametrize("name", NAMES)
def test_five_steps_of_bitsandbytes(name, search, monkeypatch):
    """With its own search ours is replaced by, and with an exact one that its own is replaced by."""
    if search == "bins":
        monkeypatch.setattr(DynamicMap, "nearest", in_bins)
    else:
        monkeypatch.setattr(bnb_cpu, "_quant_blockwise_fp32_direct", exactly)
    o, rate = Optimizer(name=name, clip=1e9, no_decay=()), 0.002
    decay = 0.0 if name == "momentum8bit" else 0.1
    start = np.clip(0.05 * drawn(SHAPE), -0.2, 0.2)
    theirs, parameters = torch.nn.Parameter(torch.tensor(start)), {"w": jnp.asarray(start)}
    optimizer, other = make_optimizer(o), peer(name, theirs, o, rate, decay)
    state, differ, compared = optimizer.init(parameters), 0, 0
    same = np.ones(SHAPE, bool)
    for seed, scale in enumerate((1.0, 0.5, 3.0, 1.0, 0.2), 1):
        gradient = np.float32(scale) * drawn(SHAPE, seed)
        direction, state = optimizer.update({"w": jnp.asarray(gradient)}, state, parameters)
        parameters = apply_updates(parameters, direction, {"w": True}, jnp.float32(rate), jnp.float32(decay))
        theirs.grad = torch.tensor(gradient)
        other.step()
        for i, field in enumerate(FIELDS[name]):
            ours, kept = getattr(state[1], field)["w"], other.state[theirs]
            apart = np.asarray(ours.codes).astype(int) - kept[f"state{i + 1}"].numpy()
            assert np.abs(apart).max() <= 1
            same &= apart == 0
            differ, compared = differ + (apart != 0).sum(), compared + apart.size
            np.testing.assert_allclose(ours.absmax.ravel(), kept[f"absmax{i + 1}"].numpy(), rtol=1e-6)
    ours, theirs = np.asarray(parameters["w"])[same], theirs.detach().numpy()[same]
    far = np.abs(ours - theirs).max()
    print(name, search, f"{differ} of {compared} codes differ; parameters by {far:.3g}")
    assert differ <= 1e-4 * compared  # where rounding decides
    assert far <= 2.4e-7


# On meshes


def mesh_of(data, model):
    return jax.sharding.Mesh(np.array(jax.devices()[:data * model]).reshape(1, data, model), AXES, axis_types=TYPES)


@pytest.mark.parametrize("spec", [P(None, "data", "model"), P(None, "model", "data")], ids=str)
@pytest.mark.parametrize(("data", "model"), [(4, 2), (2, 4)])
@pytest.mark.parametrize("n", [2048, 512, 640, 64, 24])
def test_the_same_bits_on_every_mesh(n, data, model, spec):
    """Codes lie as the parameter does; without an exchange where each device has whole blocks."""
    x = drawn((2, 8, n))
    expected = jax.jit(quantize, static_argnums=1)(x, SIGNED)
    with jax.set_mesh(mesh_of(data, model)):
        where = NamedSharding(mesh_of(data, model), spec)
        there = jax.jit(quantize, static_argnums=1).lower(jax.device_put(x, where), SIGNED).compile()
        found = there(jax.device_put(x, where))
        back = jax.jit(dequantize, static_argnums=1).lower(found, SIGNED).compile()
        expanded = back(found)
    assert found.codes.sharding.spec == expanded.sharding.spec == spec
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.absmax, expected.absmax)
    np.testing.assert_array_equal(expanded, jax.jit(dequantize, static_argnums=1)(expected, SIGNED))
    whole = n // {"data": data, "model": model}[spec[-1]] % 256 == 0
    assert (found.absmax.sharding.spec == spec) == whole
    collectives = r"all-reduce|all-gather|all-to-all|collective-permute"
    assert bool(re.search(collectives, there.as_text())) != whole
    assert not re.search(collectives, back.as_text())


@functools.cache
def records(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 300, (16, T + 1)).astype(np.int32)


def large(name: str, *overrides: str):
    """Tiny, but with matrices whose states go into 8 bits, in whole blocks and in parts."""
    sizes = ("model.D=64", "model.F=1024", "model.K=4", "model.H=16", "data.batch=16", f"optimizer.name={name}")
    return tiny("model.weight=ternary", *sizes, *overrides)


def after_three(config, state, placed) -> tuple[dict, list[float]]:
    step, losses = jax.jit(make_step(config)), []
    for batch in placed:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_steps_on_meshes(name):
    plain = large(name, "schedule.peak=0.001")
    start = first_state(plain)
    one, expected = after_three(plain, start, [records(k) for k in range(3)])
    for data, model in ((4, 2), (2, 4)):
        config, mesh = on_mesh(plain, 1, data, model)
        with jax.set_mesh(mesh):
            like = abstract(jax.eval_shape(lambda: init_state(config, jax.random.key(0))), mesh)  # noqa: B023
            state = jax.tree.map(lambda leaf, where: jax.device_put(leaf, where.sharding), start, like)
            placed = [jax.device_put(records(k), batch_sharding(mesh)) for k in range(3)]
            state, losses = after_three(config, state, placed)
        far = np.abs(np.subtract(losses, expected)).max()
        pairs = zip(stored_leaves(state), stored_leaves(one), strict=True)
        share = [np.mean(np.asarray(a.codes) != np.asarray(b.codes)) for a, b in pairs]
        print(name, data, model, f"losses differ by {far:.3g}, of codes {max(share):.3g}")
        assert far < 5e-6 and max(share) < 2e-3 and len(share) == 7 * (1 + (name == "adamw8bit"))
        up = next(leaf for leaf in stored_leaves(state) if leaf.codes.shape == (2, 64, 1024))
        assert up.codes.sharding.shard_shape(up.codes.shape) == (2, 64 // data, 1024 // model)
        assert up.absmax.sharding.shard_shape(up.absmax.shape) == (2, 64 // data, 4 // model)


def stored_leaves(state) -> list[Blockwise]:
    is_stored = lambda leaf: isinstance(leaf, Blockwise)  # noqa: E731
    return [leaf for leaf in jax.tree.leaves(state["optimizer"], is_leaf=is_stored) if is_stored(leaf)]


def test_a_step_takes_its_own_result_in_place():
    config, mesh = on_mesh(large("adamw8bit"), 2, 2, 2)
    with jax.set_mesh(mesh):
        like = abstract(jax.eval_shape(lambda: init_state(config, jax.random.key(0))), mesh)
        batch = jax.ShapeDtypeStruct((16, T + 1), jnp.int32, sharding=batch_sharding(mesh))
        step = jax.jit(make_step(config), donate_argnums=0).lower(like, batch).compile()
    given = jax.tree.leaves(like)
    for x, out, where in zip(
        given, jax.tree.leaves(step.out_info[0]), jax.tree.leaves(step.output_shardings[0]), strict=True
    ):
        assert (x.shape, x.dtype) == (out.shape, out.dtype) and x.sharding.is_equivalent_to(where, x.ndim)
    held = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in given)
    assert step.memory_analysis().alias_size_in_bytes >= held


def test_steps_are_lowered_for_tpus_that_are_not_here():
    """Where no array can be made while a step is traced."""
    code = (
        "import sys; from spectra_jax import config; from spectra_jax.plan.program import lowered; "
        "from spectra_jax.sharding import abstract_mesh; c = config.load(sys.argv[1], sys.argv[2:]); "
        "print(lowered(c, abstract_mesh(c, 8), 'tpu').as_text())"
    )
    settings = ("optimizer.name=adamw8bit", "data.batch=32", "model.L=2", "mesh.model=2")
    command = [sys.executable, "-c", code, "configs/trilm.py:99m", *settings]
    run = {"env": environment(), "cwd": ROOT, "capture_output": True, "text": True, "timeout": 200}
    found = subprocess.run(command, check=False, **run)
    assert found.returncode == 0 and "tensor<2x512x1280xui8>" in found.stdout, found.stderr


# What they take, and what they cost


def test_which_states_are_in_8_bits():
    """A layer's matrix counts, not the stack of them; embedding and head by their names."""
    config = large("adamw8bit", "model.L=3", "optimizer.float_below=4097")
    state = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))["optimizer"][1]
    for moments in (state.mu, state.nu):
        blocks = moments["blocks"]
        assert all(isinstance(blocks["mlp"][name]["w"], Blockwise) for name in ("gate", "up", "down"))
        floats = [*blocks["attention"].values(), blocks["mlp_norm"], {"w": moments["embedding"]}, moments["norm"]]
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(floats))  # 64 x 64 = 4096 in q, k, v, o
    every = large("adamw8bit", "optimizer.float_below=0", "optimizer.float_states=")
    assert len(stored_leaves(jax.eval_shape(functools.partial(init_state, every), jax.random.key(0)))) == 24


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("lion", 1), ("momentum", 1)])
def test_bits_per_parameter(name, moments):
    """32 or 8.125 for each moment of a block's matrix, in the plan and above a run's progress as in the arrays."""
    config = configs.load("configs/trilm.py:390m", (f"optimizer.name={name}",))
    small, n = replace(config, optimizer=replace(config.optimizer, name=f"{name}8bit")), count(config.model)
    rest = n.total - n.linear  # embedding, head and gains
    scalars = 0 if name == "momentum" else 4  # the number of steps
    assert state_bytes(config.model, config.optimizer) == 4 * moments * n.total + scalars
    assert state_bytes(small.model, small.optimizer) == moments * (8.125 * n.linear / 8 + 4 * rest) + scalars
    saved = estimate.state(config, (1, 2, 2)) - estimate.state(small, (1, 2, 2))
    assert saved == pytest.approx(moments * n.linear * (32 - 8.125) / 8 / 4, abs=1)
    assert estimate.peak(config, (1, 2, 2)) - estimate.peak(small, (1, 2, 2)) == saved
    assert optimizer_line(small).startswith(f"optimizer {name}8bit: ") and "bits per parameter" in optimizer_line(small)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [("adamw", 0.01), ("lion", 0.002), ("momentum", 0.3)])
def test_the_loss_stays_near_that_of_float_states(name, rate):
    """120 steps on six batches, again and again, which a tiny model begins to learn by heart."""
    losses = {}
    for kind in (name, f"{name}8bit"):
        config = tiny(f"optimizer.name={kind}", "optimizer.float_below=0", f"schedule.peak={rate}", "train.steps=120")
        state, step, found = first_state(config), jax.jit(make_step(config), donate_argnums=0), []
        for k in range(120):
            state, metrics = step(state, records(k % 6)[:8])
            found.append(float(metrics["loss"]))
        losses[kind] = np.array(found)
    ours, floats = losses[f"{name}8bit"], losses[name]
    print(name, "first", floats[0], "last", floats[-6:].mean(), ours[-6:].mean(), "apart", np.abs(ours - floats).max())
    assert floats[-6:].mean() < floats[:6].mean() - 0.3
    assert abs(ours[-6:].mean() - floats[-6:].mean()) < 0.03


# Refused


def test_unusable_settings_are_refused():
    with pytest.raises(UserError, match=r"config\.optimizer\.name.*adamw8bit"):
        make_optimizer(Optimizer(name="adam8bit"))
    with pytest.raises(UserError, match=r"no state in 8 bits: .* 2,048 elements, .*float_below=4096 .* use adamw$"):
        init_state(tiny("optimizer.name=adamw8bit"), jax.random.key(0))
    with pytest.raises(UserError, match=r"config\.optimizer\.float_below=-1 must be"):
        tiny("optimizer.float_below=-1")
    with pytest.raises(UserError, match="float_states"):
        tiny("optimizer.float_state=head")


def test_every_optimizer_is_taken_by_name():
    assert set(DIRECTIONS) >= {"adamw", "lion", "momentum", *NAMES}
