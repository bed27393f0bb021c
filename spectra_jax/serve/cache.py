"""Keys and values of the tokens so far: prompts are run once, and then a token at a time.

Prompts of unequal lengths are padded on the right. So position t of every row is slot t, causal attention needs no
further mask (what stands behind a row's end is never seen from before it), and a prompt runs through the very
attention of training. Tokens that follow are written behind the padding, all rows of a batch into the same slot: one
slice in place, where a slot of each row's own would be a scatter. Keys are turned to their position before they are
written, and so attention does not ask in which slot they are, only which slots a row may see.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int8

from spectra_jax.errors import UserError
from spectra_jax.model.attention import MASKED, get_attention
from spectra_jax.model.transformer import Transformer
from spectra_jax.sharding import in_mesh

STORED = ("auto", "int8")  # in the compute dtype, or in 8 bits
LARGEST = 127


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bytes:
    """Keys or values as scale times code, with a scale for each token and head."""

    codes: Int8[Array, "*B K C H"]
    scales: Float[Array, "*B K C"]

    @classmethod
    def of(cls, x: Float[Array, "*B K C H"]) -> "Bytes":
        """The nearest; a head's largest magnitude is the code 127."""
        x = x.astype(jnp.float32)
        scales = jnp.max(jnp.abs(x), axis=-1) / LARGEST
        codes = jnp.round(x / jnp.where(scales == 0, 1, scales)[..., None])
        return cls(codes.astype(jnp.int8), scales)


Stored = Array | Bytes


@no_type_check  # as above
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, in C slots a row: heads before slots, so that a head's are one matrix."""

    layers: tuple[tuple[Stored, Stored], ...]
    lengths: Int[Array, "B"]  # tokens of each prompt
    used: Int[Array, ""]  # slots that are taken
    padded: int = field(metadata={"static": True})  # slots of the longest prompt and its padding

    @property
    def capacity(self) -> int:
        """Slots of a row, C."""
        return jax.tree.leaves(self.layers)[0].shape[-2]

    def seen(self) -> Bool[Array, "B C"]:
        """The slots that a row's next token sees: its prompt, what followed, and itself."""
        slots = jnp.arange(self.capacity)[None]
        return (slots < self.lengths[:, None]) | ((slots >= self.padded) & (slots <= self.used))


def prefill(
    model: Transformer, tokens: Int[Array, "B P"], lengths: Int[Array, "B"], capacity: int, stored: str = "auto"
) -> tuple[Float[Array, "B P D"], Cache]:
    """Runs prompts, padded on the right to P tokens: the states of all their tokens, and a cache for what follows.

    Args:
      model: with frozen or float matrices.
      capacity: slots of a row, at least P.
      stored: "auto" or "int8". Prompts themselves attend to exact keys and values.

    Raises:
      UserError: the prompts do not fit.
    """
    m, layers = model.m, []
    if tokens.shape[1] > capacity:
        raise UserError(f"{tokens.shape[1]} tokens of a prompt exceed the cache's {capacity} slots; use a larger cache")

    def attend(q: Array, k: Array, v: Array) -> Array:
        room = ((0, 0), (0, capacity - k.shape[1]), (0, 0), (0, 0))
        layers.append(tuple(_stored(_heads_first(jnp.pad(x, room)), stored) for x in (k, v)))
        return get_attention(m.attention)(q, k, v, blocks=m.attention_blocks)

    hidden = model.hidden(tokens, attend)
    return hidden, Cache(tuple(layers), lengths, jnp.int32(tokens.shape[1]), tokens.shape[1])


def decode(model: Transformer, tokens: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B 1 D"], Cache]:
    """Runs the next token of every row: its state, and the cache with it.

    The caller sees to it that a slot is free.
    """
    old, new, seen = iter(cache.layers), [], cache.seen()

    def attend(q: Array, k: Array, v: Array) -> Array:
        keys, values = (_written(one, x, cache.used) for one, x in zip(next(old), (k, v)))
        new.append((keys, values))
        return attention(q, keys, values, seen)

    positions = (cache.lengths + (cache.used - cache.padded))[:, None]
    hidden = model.hidden(tokens[:, None], attend, positions)
    return hidden, Cache(tuple(new), cache.lengths, cache.used + 1, cache.padded)


def attention(
    q: Float[Array, "B 1 N H"], keys: Stored, values: Stored, seen: Bool[Array, "B C"]
) -> Float[Array, "B 1 N H"]:
    """One query per row against the slots that it sees; scores, softmax and sums in float32."""
    B, _, N, H = q.shape
    K = jax.tree.leaves(keys)[0].shape[-3]
    batch, _, heads, _ = jax.typeof(q).sharding.spec
    spec = lambda *axes: PartitionSpec(*axes) if in_mesh() else None  # noqa: E731
    q = jnp.reshape(q, (B, K, N // K, H), out_sharding=spec(batch, heads, None, None)) * H**-0.5
    q, seen = (_without_one_row(x) for x in (q, seen[:, None, None]))
    scores = _einsum("...gh,...ch->...gc", q, keys)
    if isinstance(keys, Bytes):
        scores = scores * keys.scales[..., None, :]
    scores = jnp.where(seen, scores, MASKED)
    shares = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(shares, axis=-1, keepdims=True)
    if isinstance(values, Bytes):
        shares = shares * values.scales[..., None, :]
    mixed = _einsum("...gc,...ch->...gh", shares.astype(q.dtype), values) / total
    return jnp.reshape(mixed.astype(q.dtype), (B, 1, N, H), out_sharding=spec(batch, None, heads, None))


def _einsum(formula: str, x: Array, stored: Stored) -> Float[Array, "*B K G _"]:
    matrix = stored.codes.astype(x.dtype) if isinstance(stored, Bytes) else stored
    return jnp.einsum(formula, x, matrix, preferred_element_type=jnp.float32)


def _heads_first(x: Float[Array, "B T K H"]) -> Float[Array, "*B K T H"]:
    return _without_one_row(jnp.transpose(x, (0, 2, 1, 3)))


def _without_one_row(x: Array) -> Array:
    """Without the dim of rows where there is one.

    XLA on CPU would drop it from the products by a reshape, into which it fuses a second write of the slot, and then
    two copies of the whole cache stand where there was a write in place.
    """
    return x[0] if x.shape[0] == 1 else x


def _stored(x: Float[Array, "*B K C H"], stored: str) -> Stored:
    return Bytes.of(x) if stored == "int8" else x


def _written(stored: Stored, x: Float[Array, "B 1 K H"], slot: Int[Array, ""]) -> Stored:
    x = _heads_first(x)
    new = Bytes.of(x) if isinstance(stored, Bytes) else x
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=x.ndim - 2)
    return jax.tree.map(write, stored, new)
