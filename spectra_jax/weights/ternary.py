"""TriLM: codes in {-1, 0, 1} and one scale per shard (Spectra, Table 1 and A.1)."""

from dataclasses import dataclass

import jax.numpy as jnp

from spectra_jax.weights.rule import Rule, Statistics, along, shard_means


@dataclass(frozen=True)
class Ternary(Rule):
    """scale = eps + mean|W|;  code = round(clip(W / scale, -1, 1));  W_effective = scale * code."""

    eps: float = 1e-5  # added, not a lower bound

    name = "ternary"
    paper_bits = 1.58

    def statistics(self, ws, shards):
        """The mean magnitude of each shard."""
        return Statistics(self.eps + shard_means(jnp.abs, ws, shards))

    def codes(self, w, statistics, shards):
        """Ties (|W| exactly half the scale) round to even, to 0, as in the torch original."""
        return jnp.round(jnp.clip(w / along(statistics.scale, w, shards), -1.0, 1.0)).astype(jnp.int8)
