"""The whole model against transformers' LlamaForCausalLM on the same weights, in float32.

For quantized rules the effective matrices are copied. Straight through, the gradient of a latent
weight is the gradient of the effective one, so Llama's gradients are the expected ones there too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from llama import NAMES, llama_of
from transformers import LlamaForCausalLM
from transformers.integrations.bitnet import AutoBitLinear

from spectra_jax.model import parameters as trees
from spectra_jax.schema import Model

SMALL = Model(V=61, D=32, F=48, L=2, N=4, K=4, H=8, attention_blocks=2)
B, T = 2, 11


def tokens_for(m: Model) -> np.ndarray:
    return np.random.default_rng(0).integers(0, m.V, (B, T + 1))


def loss(graphdef, tree, tokens):
    """Mean cross-entropy of the next token, and the logits."""
    logits = trees.apply(graphdef, tree)(tokens[:, :-1])
    target = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - target), logits


def compare(
    m: Model,
    tree: dict,
    llama: LlamaForCausalLM,
    tokens: np.ndarray,
    gradients,
    found,
    *,
    atol: float,
):
    """Loss, logits and the gradient of every parameter."""
    value, logits = found
    output = llama(torch.tensor(tokens[:, :-1]))
    expected = torch.nn.functional.cross_entropy(
        output.logits.reshape(-1, m.V), torch.tensor(tokens[:, 1:].reshape(-1))
    )
    expected.backward()
    np.testing.assert_allclose(logits, output.logits.detach().numpy(), rtol=0, atol=atol)
    np.testing.assert_allclose(value, expected.item(), atol=atol)
    theirs = {name: p.grad.numpy() for name, p in llama.named_parameters()}
    pairs = [(gradients["embedding"], theirs["model.embed_tokens.weight"])]
    if not m.tie_embeddings:
        pairs.append((gradients["head"].T, theirs["lm_head.weight"]))
    pairs.append((gradients["norm"]["gain"], theirs["model.norm.weight"]))
    for layer in range(m.L):
        for (module, name), their in NAMES.items():
            ours = gradients["blocks"][module][name]["w"][layer].T
            pairs.append((ours, theirs[f"model.layers.{layer}.{their}.weight"]))
        if "attention_norm" in gradients["blocks"]:
            ours = gradients["blocks"]["attention_norm"]["gain"][layer]
            pairs.append((ours, theirs[f"model.layers.{layer}.input_layernorm.weight"]))
    for ours, reference in pairs:
        np.testing.assert_allclose(ours, reference, rtol=0, atol=atol * np.abs(reference).max())


def gradient(graphdef, tree, tokens):
    step = jax.jit(jax.value_and_grad(lambda p, t: loss(graphdef, p, t), has_aux=True))
    return step(tree, jnp.asarray(tokens))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"K": 2, "tie_embeddings": True, "rope_base": 500.0},
        {"K": 1, "H": 12, "norm_eps": 1e-2, "attention": "reference"},
    ],
    ids=["plain", "grouped-tied-rope", "one-kv-head-wide"],
)
def test_float_is_llama(build, changes):
    m = dataclasses.replace(SMALL, **changes)
    (graphdef, tree), tokens = build(m), tokens_for(m)
    found, gradients = gradient(graphdef, tree, tokens)
    assert np.abs(found[1]).max() > 1  # logits that differ, so that the tolerance means something
    compare(m, tree, llama_of(m, tree), tokens, gradients, found, atol=2e-5)


def ternary64(ws: list[np.ndarray], count: int, axis: int) -> list[np.ndarray]:
    """Effective matrices of TriLM, scales shared by all of `ws`, in float64."""
    pieces = [np.split(w.astype(np.float64), count, axis=axis) for w in ws]
    scales = [
        1e-5 + np.abs(np.concatenate([p[s].ravel() for p in pieces])).mean() for s in range(count)
    ]
    codes = [[np.round(np.clip(p[s] / scales[s], -1, 1)) for s in range(count)] for p in pieces]
    return [np.concatenate([c * g for c, g in zip(code, scales)], axis=axis) for code in codes]


def with_effective(tree: dict, layers: int, count: int, share: bool) -> dict:
    """The parameters with TriLM's effective matrices in place of the latent ones."""
    blocks = {name: dict(node) for name, node in tree["blocks"].items()}
    groups = [("attention", ("q", "k", "v"))] if share else [("attention", (n,)) for n in "qkv"]
    groups += [("attention", ("o",)), ("mlp", ("gate",)), ("mlp", ("up",)), ("mlp", ("down",))]
    for module, names in groups:
        axis = 0 if names in (("o",), ("down",)) else 1
        stacked = [np.asarray(tree["blocks"][module][name]["w"]) for name in names]
        per_layer = [ternary64([w[i] for w in stacked], count, axis) for i in range(layers)]
        for name, matrices in zip(names, zip(*per_layer)):
            blocks[module][name] = {"w": jnp.asarray(np.stack(matrices), jnp.float32)}
    return {**tree, "blocks": blocks}


@pytest.mark.parametrize("share", [False, True])
def test_ternary_is_llama_with_effective_matrices(build, share):
    m = dataclasses.replace(SMALL, K=2, weight="ternary", scale_shards=4, share_qkv_scale=share)
    (graphdef, tree), tokens = build(m), tokens_for(m)
    found, gradients = gradient(graphdef, tree, tokens)
    llama = llama_of(m, with_effective(tree, m.L, m.scale_shards, share))
    compare(m, tree, llama, tokens, gradients, found, atol=2e-5)


def test_bitnet_is_llama_with_bit_linears(build):
    """BitNet's layers normalise their input, so the norms before attention and MLP fall away.

    An activation within float32's error of a tie could round to either of two of its 255 levels.
    With these weights none is: noise of 3e-7 on the embeddings moves the logits by 2e-6 at most.
    """
    m = dataclasses.replace(SMALL, K=2, weight="bitnet158")
    (graphdef, tree), tokens = build(m), tokens_for(m)
    found, gradients = gradient(graphdef, tree, tokens)
    llama = llama_of(m, tree)
    for block in llama.model.layers:
        block.input_layernorm = block.post_attention_layernorm = torch.nn.Identity()
        for name in NAMES.values():
            plain = block.get_submodule(name)
            quantized = AutoBitLinear(
                plain.in_features,
                plain.out_features,
                bias=False,
                online_quant=True,
                use_rms_norm=True,
            )
            quantized.weight.data = plain.weight.data
            block.set_submodule(name, quantized)
    with torch.compiler.set_stance("force_eager"):
        compare(m, tree, llama, tokens, gradients, found, atol=2e-5)
