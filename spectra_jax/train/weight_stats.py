"""What training does to quantized weights: zeros, flips and scales per kind of matrix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from spectra_jax.model.matrices import shards_of, stacked_statistics
from spectra_jax.model.parameters import block_matrices
from spectra_jax.schema import Model
from spectra_jax.weights import get_rule

Codes = dict[str, Array]


def make_weight_stats(m: Model) -> Callable[[PyTree, Codes | None], tuple[dict[str, dict[str, Array]], Codes]]:
    """A function of (parameters, earlier codes) that gives per kind of matrix

      zeros: the share of codes that are 0;  scale: the mean over layers and shards;
      flips: the share of codes that differ from the earlier ones (absent without those);

    and the present codes, for the next call. Jit it.
    """
    rule = get_rule(m.weight)

    def stats(parameters: PyTree, earlier: Codes | None) -> tuple[dict[str, dict[str, Array]], Codes]:
        ws = block_matrices(parameters)
        statistics = stacked_statistics(m, ws)
        found, codes = {}, {}
        for key, w in ws.items():
            kind, shards = key[1], shards_of(m, key)
            now = jax.vmap(lambda w, s: rule.codes(w, s, shards))(w, statistics[key])
            found[kind] = {"zeros": jnp.mean(now == 0), "scale": jnp.mean(statistics[key].scale)}
            if earlier is not None:
                found[kind]["flips"] = jnp.mean(now != earlier[kind])
            codes[kind] = now
        return found, codes

    return stats
