"""What training does to quantized weights: zeros, flips and scales per kind of matrix."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from spectra_jax.model.matrices import Key, stacked_codes, stacked_statistics
from spectra_jax.model.parameters import block_matrices
from spectra_jax.schema import Model

Codes = dict[Key, Array]


def make_weight_stats(m: Model) -> Callable[[PyTree, Codes | None], tuple[dict[str, dict[str, Array]], Codes]]:
    """A function of (parameters, earlier codes) that gives per kind of matrix

      zeros: the share of codes that are 0;  scale: the mean over layers and shards;
      flips: the share of codes that differ from the earlier ones (absent without those);

    and the present codes, for the next call. Jit it.
    """

    def stats(parameters: PyTree, earlier: Codes | None) -> tuple[dict[str, dict[str, Array]], Codes]:
        ws = block_matrices(parameters)
        statistics = stacked_statistics(m, ws)
        codes = stacked_codes(m, ws, statistics)
        found = {}
        for key, now in codes.items():
            kind = key[1]
            found[kind] = {"zeros": jnp.mean(now == 0), "scale": jnp.mean(statistics[key].scale)}
            if earlier is not None:
                found[kind]["flips"] = jnp.mean(now != earlier[key])
        return found, codes

    return stats
