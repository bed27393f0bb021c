"""The one transformer: float, ternary, binary or BitNet, latent or frozen, in training and in evaluation.

Llama-shaped (Spectra, section 3.1): RMSNorm with gain, rotary embeddings, SwiGLU, no biases, untied embeddings by
default. Blocks are stacked along a leading axis L and run under `lax.scan`.
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from spectra_jax.errors import one_of
from spectra_jax.model.attention import get_attention
from spectra_jax.model.layers import Linear, RMSNorm, rotary_tables, rotary_tables_at, rotate
from spectra_jax.model.matrices import HEAD, MATRICES, Key, head_statistics, residual_std, shards_of, stacked_statistics
from spectra_jax.model.mlgru import MLGRU
from spectra_jax.schema import Model
from spectra_jax.sharding import Rules, gathered
from spectra_jax.weights import get_rule
from spectra_jax.weights.form import Form
from spectra_jax.weights.frozen import matmul
from spectra_jax.weights.gather import Gathering
from spectra_jax.weights.rule import Statistics

Scales = dict[Key, Statistics | None]
# What may take the place of a mixer's own way over time, as a cache does. Of attention: (q, k, v), rotated, to what the
# values mix to. It is called once a layer, in their order.
Attend = Callable[..., Array]

# What the backward pass finds stored, by name: everything, matrix products only, or block inputs only.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

def compute_dtype(model: Model) -> jnp.dtype:
    """The dtype of activations: as configured, or bfloat16 where the default device is fast at it."""
    if model.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(model.compute_dtype)


class Attention(nnx.Module):
    """q, k, v projections, rotary embedding, causal attention, output projection.

    Every mixer has the methods of this one.
    """

    def __init__(self, m: Model, rules: Rules, *, rngs: nnx.Rngs):
        self.m, self.rules = m, rules
        cut, last = partial(shards_of, m), residual_std(m)
        gather = Gathering.of(m)
        make = partial(Linear, rule=get_rule(m.weight), rules=rules, gather=gather, rngs=rngs)
        self.q = make((m.D, m.N * m.H), ("embed", "heads"), shards=cut(("attention", "q")), std=m.init_std)
        self.k = make((m.D, m.K * m.H), ("embed", "heads"), shards=cut(("attention", "k")), std=m.init_std)
        self.v = make((m.D, m.K * m.H), ("embed", "heads"), shards=cut(("attention", "v")), std=m.init_std)
        self.o = make((m.N * m.H, m.D), ("heads", "embed"), shards=cut(("attention", "o")), std=last)

    @staticmethod
    def learned(m: Model) -> int:
        """Values of a layer beside the matrices."""
        return 0

    def over_layers(self) -> PyTree:
        """What each layer takes of all of them, stacked; asked of a module with stacked parameters."""
        return None

    def __call__(
        self, x: Float[Array, "B T D"], tables: tuple, scales: Scales, of_layers: PyTree, attend: Attend | None = None
    ) -> Float[Array, "B T D"]:
        """What attention adds to the residual stream. `of_layers` is this layer's part of `over_layers`."""
        m, (B, T, _) = self.m, x.shape
        joined, split = self.rules("batch", "time", "heads"), self.rules("batch", "time", "heads", None)

        def heads(matrix: Callable[..., Array], name: str, count: int) -> Array:
            flat = matrix(x, joined, scales["attention", name])
            return jnp.reshape(flat, (B, T, count, m.H), out_sharding=split)

        q, k, v = heads(self.q, "q", m.N), heads(self.k, "k", m.K), heads(self.v, "v", m.K)
        attend = attend or partial(get_attention(m.attention), blocks=m.attention_blocks)
        mixed = attend(rotate(q, tables), rotate(k, tables), v)
        mixed = jnp.reshape(mixed, (B, T, m.N * m.H), out_sharding=joined)
        return self.o(mixed, self.rules("batch", "time", "act"), scales["attention", "o"])


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * (up x))."""

    def __init__(self, m: Model, rules: Rules, *, rngs: nnx.Rngs):
        self.rules = rules
        cut, last = partial(shards_of, m), residual_std(m)
        gather = Gathering.of(m)
        make = partial(Linear, rule=get_rule(m.weight), rules=rules, gather=gather, rngs=rngs)
        self.gate = make((m.D, m.F), ("embed", "ffn"), shards=cut(("mlp", "gate")), std=m.init_std)
        self.up = make((m.D, m.F), ("embed", "ffn"), shards=cut(("mlp", "up")), std=m.init_std)
        self.down = make((m.F, m.D), ("ffn", "embed"), shards=cut(("mlp", "down")), std=last)

    def __call__(self, x: Float[Array, "B T D"], scales: Scales) -> Float[Array, "B T D"]:
        """What the MLP adds to the residual stream."""
        out = self.rules("batch", "time", "ffn")
        gate = self.gate(x, out, scales["mlp", "gate"])
        hidden = jax.nn.silu(gate) * self.up(x, out, scales["mlp", "up"])
        return self.down(hidden, self.rules("batch", "time", "act"), scales["mlp", "down"])


# A new mixer is a new file with a class like `Attention` and a line here.
MIXERS: dict[str, type[nnx.Module]] = {"attention": Attention, "mlgru": MLGRU}


def get_mixer(name: str) -> type[nnx.Module]:
    """The mixer of this name.

    Raises:
      UserError: there is none; the message names the nearest.
    """
    return MIXERS[one_of(name, MIXERS, "config.model.mixer")]


class Block(nnx.Module):
    """x + mixer(norm x), then x + mlp(norm x); a rule that normalises its own input drops the norms.

    The mixer stands as `attention`, whichever it is.
    """

    def __init__(self, m: Model, rules: Rules, *, rngs: nnx.Rngs):
        normless = get_rule(m.weight).normalises_input
        self.attention_norm = None if normless else RMSNorm(m.D, m.norm_eps)
        self.mlp_norm = None if normless else RMSNorm(m.D, m.norm_eps)
        self.attention = get_mixer(m.mixer)(m, rules, rngs=rngs)
        self.mlp = MLP(m, rules, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], tables: tuple, scales: Scales, of_layers: PyTree, attend: Attend | None = None
    ) -> Float[Array, "B T D"]:
        """The residual stream after the block."""
        normal = self.attention_norm(x) if self.attention_norm else x
        x = x + self.attention(normal, tables, scales, of_layers, attend)
        return x + self.mlp(self.mlp_norm(x) if self.mlp_norm else x, scales)


class Transformer(nnx.Module):
    """Tokens to the last hidden states, or on to logits."""

    def __init__(self, m: Model, rules: Rules = Rules(), *, rngs: nnx.Rngs):
        """Builds with random weights; under a mesh every parameter is born with its sharding.

        Raises:
          UserError: an unknown mixer, weight rule, attention or remat policy.
        """
        one_of(m.remat, REMAT, "config.model.remat"), get_attention(m.attention)
        self.m, self.rules = m, rules
        init = jax.nn.initializers.normal(m.init_std)
        self.embedding = nnx.Param(
            init(rngs.params(), (m.V, m.D), jnp.float32, out_sharding=rules("vocab", "embed"))
        )
        self.blocks = jax.vmap(lambda r: Block(m, rules, rngs=r))(rngs.split(m.L))
        self.norm = RMSNorm(m.D, m.norm_eps)
        if not m.tie_embeddings:
            head = init(rngs.params(), (m.D, m.V), jnp.float32, out_sharding=rules("embed", "vocab"))
            self.head = nnx.Param(get_rule(m.weight).latent(head, HEAD) if m.quantized_head else head)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first block reads, in the compute dtype."""
        # Every device looks up its own columns of all rows of its slice, and rows are exchanged: less to move than the
        # table and its gradient, which is then added up where it stays, in float32.
        split = self.rules.without("batch", "embed")
        tokens = gathered(tokens, split("batch", "time"))
        x = self.embedding[...].at[tokens].get(out_sharding=split("batch", "time", "embed"))
        return gathered(x.astype(compute_dtype(self.m)), self.rules("batch", "time", "act"))

    def hidden(
        self, tokens: Int[Array, "B T"], attend: Attend | None = None, positions: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """The normalised states that the head multiplies, in the compute dtype.

        Args:
          attend: replaces the mixer's way over time; block matrices must be frozen or float then.
          positions: of the tokens with it, by default from 0 up.
        """
        m, x = self.m, self.embed(tokens)
        tables = rotary_tables(tokens.shape[1], m.H, m.rope_base)
        if attend is not None:
            tables = tables if positions is None else rotary_tables_at(positions, m.H, m.rope_base)
            over_layers = self.blocks.attention.over_layers()
            for i in range(m.L):  # not scanned: a layer's keys and values are then written in place (serve/cache.py)
                of_layers = jax.tree.map(itemgetter(i), over_layers)
                x = self.layer(i)(x, tables, dict.fromkeys(MATRICES), of_layers, attend)
            return self._normal(x)
        return self._scanned(x, tables, features=False)[0]

    def features(self, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"]]:
        """The states of `hidden`, and the residual stream after every block."""
        return self._scanned(self.embed(tokens), rotary_tables(tokens.shape[1], self.m.H, self.m.rope_base), True)

    def _scanned(self, x: Array, tables: tuple, features: bool) -> tuple[Array, Array | None]:
        m = self.m

        def block(x: Array, layer: tuple[Block, Scales, PyTree]) -> tuple[Array, Array | None]:
            module, scales, of_layers = layer
            x = module(x, tables, scales, of_layers)
            return x, x if features else None

        if m.remat != "none":
            # Inside a loop nothing can be merged with the forward pass; in unrolled code it has to be prevented.
            block = jax.checkpoint(block, policy=REMAT[m.remat], prevent_cse=m.unroll > 1)
        layers = self.blocks, self.scales(), self.blocks.attention.over_layers()
        x, found = jax.lax.scan(block, x, layers, unroll=min(m.unroll, m.L))
        return self._normal(x), found

    def _normal(self, x: Array) -> Array:
        """With what the weight rule does to the input of a quantized head."""
        x = self.norm(x)
        if self.m.quantized_head:
            head = self.head.get_value()
            x = get_rule(self.m.weight).activation(x, head)
            x = head.activation(x) if isinstance(head, Form) else x
        return x

    def layer(self, i: int) -> Block:
        """One block; its parameters are cut from stacked ones, or taken from tuples with one array or form a layer."""
        return jax.tree.map(lambda x: x[i], self.blocks, is_leaf=lambda node: isinstance(node, tuple))

    def scales(self) -> Scales:
        """Statistics of every latent matrix, stacked over layers."""
        ws = {(module, name): getattr(getattr(self.blocks, module), name).w for module, name in MATRICES}
        return stacked_statistics(self.m, {key: w.get_value() for key, w in ws.items()})

    def head_matrix(self) -> Float[Array, "D V"]:
        """The matrix that turns hidden states into logits."""
        if self.m.tie_embeddings:
            return self.embedding[...].T
        if not self.m.quantized_head:
            return self.head[...]
        rule, head = get_rule(self.m.weight), self.head.get_value()
        return head.dequantize() if isinstance(head, Form) else rule.effective(head, head_statistics(rule, head), HEAD)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the next token at every position, in float32."""
        return self.logits(self.hidden(tokens))

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """What the head makes of the states of `hidden`."""
        spec = self.rules("batch", "time", "vocab")
        head = None if self.m.tie_embeddings else self.head.get_value()
        if isinstance(head, Form) and type(head.core).product is not Form.product:
            return matmul(hidden.astype(jnp.float32), head.core, spec)
        return jnp.einsum(
            "btd,dv->btv",
            hidden,
            self.head_matrix().astype(hidden.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=spec,
        )
