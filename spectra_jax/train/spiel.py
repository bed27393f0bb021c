"""SpIEL: fine-tuning of a few weights, whose places are chosen as training goes on (arXiv 2401.16405).

A block matrix is W = W0 + delta, where delta is zero but at k = density * in * out places. Its values are trained by
Adam. From time to time the smallest are given up, their weights return to W0 to the last bit, and as many new ones
grow from zero where the gradient was largest. This is the variant that accumulates gradients (SpIEL-AG).

With t the number of updates done, R = `every` and a = `collect`: a phase begins before the first update and wherever
t = R - 1 (mod R). Its first gradient names the candidates, the k largest; that gradient and those that follow are
added up there, with their squares. It ends after the update that makes t = a (mod R): int(k * p) values are given up,
with p = 1 the first time and `replaced` * (1 - t/T) later, and the candidates with the largest sums, of those that
are not among the survivors, take their places. Who is given up and chosen again stays as it was.

All of it is one compiled step: what a phase does depends on a count in the state. JAX forms the gradient of the whole
matrix at every step, which the published code does on selection steps alone; every device gets a copy of it. So k
places cost the memory of k weights in the optimizer's state, not in the gradient.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from spectra_jax.checksum import dotted
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import is_block_matrix
from spectra_jax.schema import Optimizer, Spiel
from spectra_jax.sharding import gathered
from spectra_jax.train.final import Final


class Entries(NamedTuple):
    """The tuned weights of a matrix, by place; with a dim of layers before k in the optimizer's state."""

    index: Int[Array, "k"]  # in the flattened matrix, ascending
    base: Float[Array, "k"]  # W0 there
    value: Float[Array, "k"]  # delta: the weight is base + value, rounded once
    m: Float[Array, "k"]
    v: Float[Array, "k"]
    age: Int[Array, "k"]  # updates that the next bias correction counts
    candidate: Int[Array, "k"]  # ascending
    total: Float[Array, "k"]  # sum of the candidates' gradients in this phase, and of their squares
    squares: Float[Array, "k"]


class SpielState(NamedTuple):
    """`tuned` has Entries for each stack of block matrices and None for any other parameter."""

    step: Int[Array, ""]  # updates done; skipped steps are none
    samples: Int[Array, ""]  # gradients added up in this phase
    tuned: PyTree


def spiel(o: Optimizer) -> optax.GradientTransformationExtraArgs:
    """The transformation: `update` returns each parameter as it will be (`Final`).

    It reads the rate and decay of the step, and of how many steps there are in all. The decay pulls a delta to zero,
    that is a weight to W0; parameters that are no block matrix stay what they are.
    """
    return optax.GradientTransformationExtraArgs(lambda parameters: _init(o, parameters), _updater(o))


def places(s: Spiel, size: int) -> int:
    """k: tuned weights of a matrix of so many."""
    return int(s.density * size)


def replacements(s: Spiel, k: int, steps: int) -> list[int]:
    """How many values the first, second, ... selection gives up: a table, as `steps` is known before training."""
    done = range(s.collect, steps + 1, s.every)
    return [k if n == 0 else int(k * (s.replaced * (1 - t / steps))) for n, t in enumerate(done)] or [0]


def _init(o: Optimizer, parameters: PyTree) -> SpielState:
    leaves, structure = jax.tree_util.tree_flatten_with_path(parameters)
    key = jax.random.key(o.spiel.seed)
    tuned = [
        _first(o.spiel, jax.random.fold_in(key, i), w) if is_block_matrix(path) else None
        for i, (path, w) in enumerate(leaves)
    ]
    if all(entries is None for entries in tuned):
        raise UserError(
            "config.optimizer.name=spiel tunes block matrices, and none is trained: change config.optimizer.only, or, "
            "where the weight rule learns something beside each matrix, take config.model.weight=float or ternary"
        )
    return SpielState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), structure.unflatten(tuned))


def _first(s: Spiel, key: Array, w: Float[Array, "L m n"]) -> Entries:
    """Random places with nothing learned; one layer after the other, as a choice takes memory of a whole matrix."""
    flat = _flat(w)
    layers, size = flat.shape
    k = places(s, size)

    def choose(key: Array) -> Array:
        return jnp.sort(jax.random.choice(key, size, (k,), replace=False)).astype(jnp.int32)

    index = jax.lax.map(choose, jax.random.split(key, layers))
    zero = jnp.zeros((layers, k), jnp.float32)
    base = jnp.take_along_axis(flat, index, axis=1)
    return Entries(index, base, zero, zero, zero, jnp.ones_like(index), index, zero, zero)


def _updater(o: Optimizer) -> Callable:
    s = o.spiel

    def update(
        gradient: PyTree, state: SpielState, parameters: PyTree, *, rate: Float[Array, ""], decay: Float[Array, ""],
        steps: int, **_: Any,
    ) -> tuple[PyTree, SpielState]:
        phase = state.step % s.every
        begins = (state.step == 0) | (phase == s.every - 1)
        collects, ends = begins | (phase < s.collect), phase == s.collect - 1
        samples = jnp.where(begins, 1, state.samples + collects)

        def one(path: tuple, w: Array, g: Array, entries: Entries | None) -> tuple[Final, Entries | None]:
            if entries is None:
                return Final(w), None
            decayed = not any(part in dotted(path) for part in o.no_decay)
            before, flat, slope = entries, _flat(w), _flat(g)
            entries = jax.vmap(lambda e, g: _adam(o, e, g, rate, decay if decayed else 0.0))(entries, slope)
            candidate = jax.lax.cond(begins, _largest, lambda slope, old: old, slope, entries.candidate)
            entries = _collect(entries._replace(candidate=candidate), slope, begins, collects)
            table = jnp.asarray(replacements(s, candidate.shape[1], steps))
            entries = jax.lax.cond(
                ends,
                lambda e: jax.vmap(lambda e, w: _reselect(o, e, w, table[state.step // s.every], samples))(e, flat),
                lambda e: e, entries,
            )
            flat = jax.vmap(lambda w, old, new: _write(w, old, new))(flat, before, entries)
            return Final(gathered(flat.reshape(w.shape), jax.typeof(w).sharding.spec)), entries

        leaves, structure = jax.tree_util.tree_flatten_with_path(parameters)
        gradients, tuned = structure.flatten_up_to(gradient), structure.flatten_up_to(state.tuned)
        done = [one(path, w, g, entries) for (path, w), g, entries in zip(leaves, gradients, tuned)]
        finals, tuned = (structure.unflatten(part) for part in zip(*done))
        return finals, SpielState(state.step + 1, samples, tuned)

    return update


def _adam(o: Optimizer, e: Entries, gradient: Float[Array, "n"], rate: Array, decay: Array | float) -> Entries:
    """Adam with a bias correction by each entry's age, then decay."""
    g = gradient[e.index]
    m = o.b1 * e.m + (1 - o.b1) * g
    v = o.b2 * e.v + (1 - o.b2) * g**2
    denominator = (jnp.sqrt(v) + o.eps) * _memory(o.b1, e.age) / jnp.sqrt(_memory(o.b2, e.age))
    value = e.value - rate * m / denominator
    return e._replace(value=value - rate * decay * value, m=m, v=v, age=e.age + 1)


def _memory(beta: float, age: Int[Array, "..."]) -> Float[Array, "..."]:
    """1 - beta^age, to the last bits also where beta is nearly 1."""
    return -jnp.expm1(age * math.log(beta)) if beta else jnp.ones(age.shape)


def _largest(gradient: Float[Array, "L n"], old: Int[Array, "L k"]) -> Int[Array, "L k"]:
    """The places of the k largest gradients of each layer, ascending."""
    return jnp.sort(jax.lax.top_k(jnp.abs(gradient), old.shape[1])[1].astype(jnp.int32), axis=1)


def _collect(e: Entries, gradient: Float[Array, "L n"], begins: Array, collects: Array) -> Entries:
    """The sums over this phase's gradients at the candidates."""
    g = jnp.where(collects, jnp.take_along_axis(gradient, e.candidate, axis=1), 0)
    return e._replace(
        total=jnp.where(begins, 0, e.total) + g, squares=jnp.where(begins, 0, e.squares) + g**2
    )


def _reselect(o: Optimizer, e: Entries, w: Float[Array, "n"], count: Array, samples: Array) -> Entries:
    """The entries after `count` were given up and as many candidates have grown; of equals the lower index comes first.

    A new entry begins with the moments that its phase's gradients would have left, and as many updates of age.
    """
    k, n = e.index.size, w.size
    dropped = _lowest(jnp.abs(e.value), count)
    place = jnp.minimum(jnp.searchsorted(e.index, e.candidate), k - 1)
    active = e.index[place] == e.candidate
    grown = _lowest(jnp.where(active & ~dropped[place], jnp.inf, -jnp.abs(e.total)), count)
    stays = jnp.zeros(k, bool).at[jnp.where(active & grown, place, k)].set(True, mode="drop")
    # n stands for no place: k of these 2k are places.
    index = jnp.concatenate([
        jnp.where(dropped & ~stays, n, e.index), jnp.where(grown & ~active, e.candidate, n)
    ])
    order = jnp.argsort(index)[:k]

    def merged(old: Array, new: Array) -> Array:
        return jnp.concatenate([old, new])[order]

    return e._replace(
        index=index[order],
        base=merged(e.base, w[e.candidate]),  # where nothing was tuned, W is W0
        value=merged(e.value, jnp.zeros(k)),
        m=merged(e.m, e.total / samples * _memory(o.b1, samples)),
        v=merged(e.v, e.squares / samples * _memory(o.b2, samples)),
        age=merged(e.age, jnp.full(k, samples)),
    )


def _lowest(x: Float[Array, "k"], count: Int[Array, ""]) -> Bool[Array, "k"]:
    """Which are the `count` smallest."""
    places = jnp.arange(x.size)
    return jnp.zeros(x.size, bool).at[jnp.argsort(x)].set(places < count)


def _write(w: Float[Array, "n"], old: Entries, new: Entries) -> Float[Array, "n"]:
    """W0 + delta: first W0 everywhere, then the tuned weights."""
    return w.at[old.index].set(old.base).at[new.index].set(new.base + new.value)


def _flat(w: Float[Array, "L m n"]) -> Float[Array, "L mn"]:
    return gathered(w).reshape(w.shape[0], -1)
