"""SpIEL against float64 NumPy written from the paper's words, and what a run may and may not change."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TERNARY, copy_of, on_mesh, same_bits, state_on_disk, tiny, trained

from spectra_jax.checks import check
from spectra_jax.errors import UserError
from spectra_jax.schema import Config, Model, Optimizer, Spiel
from spectra_jax.train.loop import train
from spectra_jax.train.optimizer import apply_updates, decay_mask, make_optimizer
from spectra_jax.train.spiel import replacements
from spectra_jax.train.step import init_state, make_step

STEPS = 60
SHAPE = (2, 9, 14)  # two layers
RUN = (
    "optimizer.name=spiel", "optimizer.only=attention.,mlp.", "optimizer.spiel.density=0.05", "optimizer.spiel.every=4",
    "optimizer.spiel.collect=2", "optimizer.weight_decay=0.1", "optimizer.clip=1e9",
)


def parameters_of(seed: int = 0) -> dict:
    rng = np.random.RandomState(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "blocks": {"attention_norm": {"gain": draw(2, 9)}, "mlp": {"up": {"w": draw(*SHAPE)}}},
        "embedding": draw(5, 9), "norm": {"gain": draw(9)},
    }


class Plain:
    """One matrix, as a dict of place -> value, m, v, age; float64 throughout."""

    def __init__(self, o: Optimizer, index: np.ndarray, steps: int):
        self.o, self.k, self.steps, self.t = o, len(index), steps, 0
        self.tuned = {int(i): [0.0, 0.0, 0.0, 1] for i in index}
        self.phase = {}  # candidate -> gradients

    def update(self, g: np.ndarray, rate: float, decay: float) -> None:
        o, s = self.o, self.o.spiel
        for i, (value, m, v, age) in self.tuned.items():
            m, v = o.b1 * m + (1 - o.b1) * g[i], o.b2 * v + (1 - o.b2) * g[i] ** 2
            step = m / ((np.sqrt(v) + o.eps) * (1 - o.b1**age) / np.sqrt(1 - o.b2**age))
            value -= rate * step
            value -= rate * decay * value
            self.tuned[i] = [value, m, v, age + 1]
        if self.t == 0 or self.t % s.every == s.every - 1:
            best = sorted(range(len(g)), key=lambda i: (-abs(g[i]), i))[: self.k]
            self.phase = {i: [] for i in best}
        for i, seen in self.phase.items():
            seen.append(g[i])
        self.t += 1
        if self.t % s.every == s.collect:
            self.select(1 if self.t == s.collect else s.replaced * (1 - self.t / self.steps))
            self.phase = {}

    def select(self, p: float) -> None:
        count = int(self.k * p)
        out = set(sorted(self.tuned, key=lambda i: (abs(self.tuned[i][0]), i))[:count])
        stay = set(self.tuned) - out
        free = [i for i in self.phase if i not in stay]
        chosen = sorted(free, key=lambda i: (-abs(sum(self.phase[i])), i))[:count]
        for i in out - set(chosen):
            del self.tuned[i]
        for i in set(chosen) - out:
            seen = np.array(self.phase[i])
            age = len(seen)
            m, v = seen.mean() * (1 - self.o.b1**age), (seen**2).mean() * (1 - self.o.b2**age)
            self.tuned[i] = [0.0, m, v, age]


@pytest.mark.parametrize(
    "s", [Spiel(density=0.2), Spiel(density=0.15, every=7, collect=3, replaced=0.7), Spiel(density=1.0, every=9)],
    ids=["published", "often", "all"],
)
def test_sixty_steps_of_float64(s):
    """Gradients with a slow part, so that entries are given up, chosen again and kept."""
    o = Optimizer(name="spiel", b1=0.9, b2=0.999, eps=1e-6, clip=1e9, spiel=s)
    start = parameters_of()
    optimizer, parameters = make_optimizer(o), jax.tree.map(jnp.asarray, start)
    state = optimizer.init(parameters)
    mask = decay_mask(o, parameters)

    @jax.jit
    def step(parameters, state, gradient, rate, decay):
        direction, state = optimizer.update(gradient, state, parameters, rate=rate, decay=decay, steps=STEPS)
        return apply_updates(parameters, direction, mask, rate, decay), state

    first = np.asarray(state[1].tuned["blocks"]["mlp"]["up"]["w"].index)
    peers = [Plain(o, index, STEPS) for index in first]
    w0 = start["blocks"]["mlp"]["up"]["w"].reshape(2, -1)
    rng, slow, worst, sets = np.random.RandomState(1), np.random.RandomState(2).standard_normal(w0.shape), 0.0, set()
    for t in range(STEPS):
        rate, decay = (0.01 * (1 - t / STEPS), 0.1) if t < 40 else (0.0 if t == 45 else 0.002, 0.0)
        g = (0.3 * slow + rng.standard_normal(w0.shape)).astype(np.float32)
        gradient = jax.tree.map(jnp.ones_like, parameters)
        gradient["blocks"]["mlp"]["up"]["w"] = jnp.asarray(g.reshape(SHAPE))
        parameters, state = step(parameters, state, gradient, jnp.float32(rate), jnp.float32(decay))
        entries = jax.tree.map(np.asarray, state[1].tuned["blocks"]["mlp"]["up"]["w"])
        w = np.asarray(parameters["blocks"]["mlp"]["up"]["w"]).reshape(2, -1)
        for layer, peer in enumerate(peers):
            peer.update(g[layer].astype(np.float64), float(np.float32(rate)), float(np.float32(decay)))
            index = entries.index[layer]
            assert index.tolist() == sorted(peer.tuned), f"step {t}"
            sets.add((layer, tuple(index)))
            theirs = np.array([peer.tuned[i] for i in index])
            assert entries.age[layer].tolist() == theirs[:, 3].tolist()
            for name, column in (("value", 0), ("m", 1), ("v", 2)):
                ours, there = getattr(entries, name)[layer], theirs[:, column]
                # Sums of terms of both signs: relative to the largest of them, not to what is left.
                np.testing.assert_allclose(ours, there, rtol=1e-5, atol=1e-5 * np.abs(theirs[:, column]).max())
                worst = max(worst, np.abs(ours - there).max() / max(np.abs(there).max(), 1e-30))
            rest = np.setdiff1d(np.arange(w.shape[1]), index)
            assert w[layer][rest].tobytes() == w0[layer][rest].tobytes(), "what is not tuned is W0"
            assert w[layer][index].tobytes() == (w0[layer][index] + entries.value[layer]).tobytes()
    print(f"largest difference {worst:.1e}, {len(sets)} sets of places")
    assert len(sets) == 2 if s.density == 1.0 else len(sets) > 5
    rest = jax.tree.map(np.asarray, parameters)
    rest["blocks"]["mlp"] = start["blocks"]["mlp"]
    assert same_bits(rest, start), "no other parameter moves, whatever its gradient and the decay"


def test_how_many_are_replaced():
    """Paper's fractions of 50 places in 100 steps: all, then int(50 * 0.2 * (1 - t/100)) at t = 25, 45, 65, 85."""
    assert replacements(Spiel(), 50, 100) == [50, 7, 5, 3, 1]
    assert replacements(Spiel(), 50, 4) == [0]  # over before the first selection


def start_and_tuned(*overrides: str):
    """A finished run and one that was tuned from it."""
    start = trained(*overrides)
    return start, trained(*overrides, f"train.start={start}", *RUN)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), TERNARY], ids=["float", "ternary"])
def test_a_run_changes_k_weights_of_each_matrix_and_no_more(overrides):
    start, tuned = start_and_tuned(*overrides)
    before, after = (state_on_disk(run, 12) for run in (start, tuned))
    spiel = after["training"]["optimizer"][1]
    changed = 0
    for module, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            old, new = (s["parameters"]["blocks"][module].pop(name)["w"] for s in (before, after))
            old, new = (w.reshape(2, -1) for w in (old, new))
            entries = spiel["tuned"]["blocks"][module][name]["w"]
            assert entries["index"].shape == (2, int(0.05 * old.shape[1]))
            for layer, index in enumerate(entries["index"]):
                expected = old[layer].copy()
                expected[index] = old[layer][index] + entries["value"][layer]
                assert new[layer].tobytes() == expected.tobytes()
                changed += (new[layer] != old[layer]).sum()
    assert changed > 100
    assert same_bits(after["parameters"], before["parameters"]), "embeddings, head, gains"


def test_resumed_amid_a_selection_is_bit_equal(tmp_path):
    """After step 8 of 12: the third phase began with that step's gradient."""
    start, tuned = start_and_tuned()
    copy = copy_of(tuned, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "12")
    assert int(state_on_disk(copy, 8)["training"]["optimizer"][1]["samples"]) == 1
    for later in copy.glob("checkpoints/1?"):
        shutil.rmtree(later)
    train(tiny(f"train.start={start}", *RUN), copy)
    assert same_bits(state_on_disk(copy, 12), state_on_disk(tuned, 12))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_any_mesh(shape):
    """The same losses within 1e-5, and the same places, as one device."""
    def losses(*shape):
        config, mesh = on_mesh(tiny(*RUN, "data.batch=16"), *shape)
        with jax.set_mesh(mesh):
            state, step = jax.jit(partial(init_state, config))(jax.random.key(0)), jax.jit(make_step(config))
            found = []
            for n in range(5):
                tokens = np.random.RandomState(n).randint(0, 300, (16, config.data.T + 1))
                state, metrics = step(state, jnp.asarray(tokens))
                found.append(metrics["loss"].item())
            entries = state["optimizer"][1].tuned["blocks"]["mlp"]["up"]["w"]
            return found, np.asarray(entries.index)

    (one, places), (many, others) = losses(1, 1, 1), losses(*shape)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert one[-1] != one[0] and places.tolist() == others.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"spiel\.density=0\.0 is a share: above 0, at most 1"),
        ({"density": 1.5}, r"spiel\.density=1\.5 is a share"),
        ({"density": float("nan")}, r"spiel\.density=nan is a share"),
        ({"replaced": 1.1}, r"spiel\.replaced=1\.1 is a share: between 0 and 1"),
        ({"collect": 0}, r"spiel\.collect=0 must be at least 1 and at most every - 2 \(18\)"),
        ({"collect": 19}, r"spiel\.collect=19 must be at least 1 and at most every - 2 \(18\)"),
        ({"seed": -1}, r"spiel\.seed=-1 must not be negative"),
        ({"density": 1e-6}, r"density=1e-06 is not one weight of the smallest block matrix, which has 262144; use"),
    ],
)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        check(Config(optimizer=Optimizer(name="spiel", spiel=Spiel(**settings))))


def test_other_bad_input():
    with pytest.raises(UserError, match=r"config\.optimizer\.rates is not for spiel"):
        check(Config(optimizer=Optimizer(name="spiel", rates=("mlp=0.5",))))
    with pytest.raises(UserError, match=r"config\.optimizer\.keep_zeros is not for spiel"):
        check(Config(optimizer=Optimizer(name="spiel", keep_zeros=True)))
    config = tiny("optimizer.name=spiel", "optimizer.only=embedding")
    with pytest.raises(UserError, match="spiel tunes block matrices, and none is trained: change"):
        jax.eval_shape(partial(init_state, config), jax.random.key(0))
    with pytest.raises(UserError, match=r"name='spyel' is not one of .*; did you mean spiel\?"):
        make_optimizer(Optimizer(name="spyel"))
    assert check(Config(model=Model(), optimizer=Optimizer(name="spiel", rates=())))
