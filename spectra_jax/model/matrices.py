"""The matrices of a block that a weight rule applies to, and their scales, for all layers at once.

Scales are taken from the stacked matrices before the scan over layers: once per step, on the shards, not again in
the backward pass, and by the same expression that freezing uses, so that both forwards give the same bits.
"""

from collections.abc import Mapping
from functools import partial

import jax
from jaxtyping import Array

from spectra_jax.schema import Model
from spectra_jax.weights import get_rule
from spectra_jax.weights.form import Form
from spectra_jax.weights.rule import Latent, Rule, Shards, Statistics

# Module and name, with the axis that model-parallel shards cut (0: in, 1: out).
MATRICES = {
    ("attention", "q"): 1, ("attention", "k"): 1, ("attention", "v"): 1, ("attention", "o"): 0,
    ("mlp", "gate"): 1, ("mlp", "up"): 1, ("mlp", "down"): 0,
}

Key = tuple[str, str]
HEAD = Shards()  # of a quantized head: one scale


def shards_of(m: Model, key: Key) -> Shards:
    """How the matrix of this kind is cut for its scales."""
    return Shards(m.scale_shards, MATRICES[key])


def shape_of(m: Model, key: Key) -> tuple[int, int]:
    """(in, out) of a matrix of this kind."""
    wide = {"q": m.N * m.H, "k": m.K * m.H, "v": m.K * m.H, "o": m.N * m.H}.get(key[1], m.F)
    return (m.D, wide) if MATRICES[key] else (wide, m.D)


def residual_std(m: Model) -> float:
    """Initial deviation of the matrices that write to the residual stream."""
    return m.init_std / (2 * m.L) ** 0.5 if m.init_residual_scaling else m.init_std


def stacked_statistics(m: Model, ws: Mapping[Key, Latent | Form]) -> dict[Key, Statistics | None]:
    """Statistics of every kind of matrix, stacked over layers: leaves (L, S).

    None where there is nothing to take: a rule without scales, or a frozen weight that holds them already.

    Args:
      ws: the stacked matrices (L, in, out) of every kind in `MATRICES`.
    """
    rule = get_rule(m.weight)
    if not rule.quantized:
        return dict.fromkeys(MATRICES)

    def take(*keys: Key) -> Statistics | None:
        group = [ws[key] for key in keys]
        if any(isinstance(w, Form) for w in group):
            return None
        group = jax.lax.stop_gradient(group)
        return jax.vmap(lambda *w: rule.statistics(w, shards_of(m, keys[0])))(*group)

    found = {key: take(key) for key in MATRICES}
    if m.share_qkv_scale:
        qkv = [("attention", name) for name in "qkv"]
        found |= dict.fromkeys(qkv, take(*qkv))
    if m.share_glu_scale:
        glu = [("mlp", name) for name in ("gate", "up")]
        found |= dict.fromkeys(glu, take(*glu))
    return found


def head_statistics(rule: Rule, head: Latent) -> Statistics | None:
    """Those of a head under the weight rule."""
    return rule.statistics([jax.lax.stop_gradient(head)], HEAD) if rule.quantized else None


def stacked_codes(
    m: Model, ws: Mapping[Key, Latent], statistics: Mapping[Key, Statistics]
) -> dict[Key, Array]:
    """Codes of every kind of latent matrix, stacked over layers: (L, in, out) int8."""
    rule = get_rule(m.weight)
    return {
        key: jax.vmap(partial(rule.codes, shards=shards_of(m, key)))(w, statistics[key]) for key, w in ws.items()
    }
