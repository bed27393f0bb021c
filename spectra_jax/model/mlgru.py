"""MLGRU, the token mixer of the Scalable MatMul-free LM (arXiv 2406.02528, section 3.3.1): a gated linear recurrence.

With x the normalised input of layer l and every matrix under the model's weight rule:

    f = lb_l + (1 - lb_l) sigmoid(W_f x)        i = silu(W_i x) (1 - f)
    h_t = f_t h_{t-1} + i_t,  h_0 = 0           out = W_o (RMSNorm(W_g x) silu(h))

Lower bounds are learned for all layers together, from P (L, D): lb = cumsum(softmax(P)) - softmax(P)[0] over layers, so
that the first layer has none and deeper ones forget less.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from spectra_jax.model.layers import Linear, RMSNorm
from spectra_jax.model.matrices import residual_std, shards_of
from spectra_jax.schema import Model
from spectra_jax.sharding import Rules, gathered
from spectra_jax.weights import get_rule
from spectra_jax.weights.gather import Gathering

# What may take the place of the recurrence from zeros, as a kept state does: (f, i) to the states of all tokens.
Recur = Callable[[Array, Array], Array]


class MLGRU(nnx.Module):
    """The recurrence between its four matrices, which stand in the places of attention's: i, f, g, o are q, k, v, o.

    So freezing, packing and statistics know them. All are (D, D): N H = K H = D. Heads divide the state over devices
    and change no number, since every dim is its own.
    """

    def __init__(self, m: Model, rules: Rules, *, rngs: nnx.Rngs):
        self.rules = rules
        make = partial(Linear, rule=get_rule(m.weight), rules=rules, gather=Gathering.of(m), rngs=rngs)
        cut = lambda name: shards_of(m, ("attention", name))  # noqa: E731
        self.q, self.k, self.v = (
            make((m.D, m.D), ("embed", "heads"), shards=cut(name), std=m.init_std) for name in "qkv"
        )
        self.o = make((m.D, m.D), ("heads", "embed"), shards=cut("o"), std=residual_std(m))
        self.gate_norm = RMSNorm(m.D, m.norm_eps)
        self.lower_bound = nnx.Param(jnp.zeros((m.D,), jnp.float32))

    @staticmethod
    def learned(m: Model) -> int:
        """Values of a layer beside the matrices: the norm's gain and a row of P."""
        return 2 * m.D

    def over_layers(self) -> Float[Array, "L D"]:
        """The lower bounds of all layers, of a module with stacked parameters."""
        P = self.lower_bound.get_value()
        shares = jax.nn.softmax(jnp.stack(P) if isinstance(P, tuple) else P, axis=0)
        return jnp.cumsum(shares, axis=0) - shares[:1]

    def __call__(
        self, x: Float[Array, "B T D"], tables: tuple, scales: dict, bound: Float[Array, "D"],
        recur: Recur | None = None,
    ) -> Float[Array, "B T D"]:
        """What the mixer adds to the residual stream; gates, states and their product in float32."""
        wide = self.rules("batch", "time", "heads")
        i, f, g = (
            matrix(x, wide, scales["attention", name]) for name, matrix in (("q", self.q), ("k", self.k), ("v", self.v))
        )
        bound = gathered(bound, self.rules("heads"))[None, None]
        f = bound + (1 - bound) * jax.nn.sigmoid(f.astype(jnp.float32))
        h = (recur or recurrence)(f, jax.nn.silu(i.astype(jnp.float32)) * (1 - f))
        mixed = (self.gate_norm(g) * jax.nn.silu(h)).astype(x.dtype)
        return self.o(mixed, self.rules("batch", "time", "act"), scales["attention", "o"])


def recurrence(f: Float[Array, "B T D"], i: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """h_t = f_t h_{t-1} + i_t from zeros, for all t in about 2 log2 T steps.

    Two neighbouring runs of tokens, each (f, i), are one: (f2 f1, f2 i1 + i2).
    """
    join = lambda a, b: (b[0] * a[0], b[0] * a[1] + b[1])  # noqa: E731
    return jax.lax.associative_scan(join, (f, i), axis=1)[1]
