"""The MatMul-free LM against PyTorch in float64, written from the paper's equations (arXiv 2406.02528)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.model import parameters as trees
from spectra_jax.model.mlgru import recurrence
from spectra_jax.schema import Config, Data, Mesh, Model, Train
from spectra_jax.sharding import batch_sharding, make_mesh

SMALL = Model(
    V=24, D=12, F=20, L=3, N=2, K=2, H=6, mixer="mlgru", weight="bitlinear", quantized_head=True, norm_eps=1e-6,
    share_glu_scale=True, attention_blocks=1,
)
B, T = 2, 6
TIES = []  # how far the float64 model's activations and weights stay from half-way between two codes


def through(x, rounded):
    """`rounded` forward, the identity backward."""
    return x + (rounded - x).detach()


def nearest(x):
    TIES.append(float((0.5 - (x.detach() - torch.round(x.detach())).abs()).min()))
    return torch.round(x)


def rms(x, gain):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * gain


def a8(x):
    s = 127 / torch.clamp(x.abs().amax(-1, keepdim=True), min=1e-5)
    return through(x, torch.clamp(nearest(x * s), -128, 127) / s)


def t(w):
    """Of one matrix, or of matrices that are one."""
    s = 1 / torch.clamp(w.abs().mean(), min=1e-5)
    return through(w, torch.clamp(nearest(w * s), -1, 1) / s)


def bit(x, p):
    """BitLinear, with matrices (in, out)."""
    return a8(rms(x, p.gain)) @ t(p.w)


def mixer(x, p, bound):
    i, f, g = (bit(x, p[name]["w"]) for name in "qkv")
    f = torch.sigmoid(f)
    f = f if bound is None else bound + (1 - bound) * f
    c = torch.nn.functional.silu(i) * (1 - f)
    h, states = torch.zeros_like(c[:, 0]), []
    for step in range(x.shape[1]):
        h = f[:, step] * h + c[:, step]
        states.append(h)
    out = rms(g, p["gate_norm"]["gain"]) * torch.nn.functional.silu(torch.stack(states, 1))
    return bit(out, p["o"]["w"])


def glu(x, p):
    gate, up, F = p["gate"]["w"], p["up"]["w"], p["gate"]["w"].w.shape[1]
    w = t(torch.cat([gate.w, up.w], 1))  # gate and up are one matrix
    g, u = a8(rms(x, gate.gain)) @ w[:, :F], a8(rms(x, up.gain)) @ w[:, F:]
    return bit(torch.nn.functional.silu(g) * u, p["down"]["w"])


def reference(m, parameters, tokens, targets):
    """Logits, the loss, and its gradients for every parameter, all in float64."""
    leaves, tree = jax.tree.flatten(parameters)
    leaves = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in leaves]
    p = jax.tree.unflatten(tree, leaves)
    shares = torch.softmax(p["blocks"]["attention"]["lower_bound"], 0)
    h = p["embedding"][torch.tensor(tokens)]
    for layer in range(m.L):
        block = jax.tree.map(lambda x: x[layer], p["blocks"])
        bound = shares[1 : layer + 1].sum(0) if layer else None
        h = h + mixer(rms(h, block["attention_norm"]["gain"]), block["attention"], bound)
        h = h + glu(rms(h, block["mlp_norm"]["gain"]), block["mlp"])
    logits = bit(rms(h, p["norm"]["gain"]), p["head"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    # The last row of P cancels out of every bound but by the sum that it is part of.
    return logits.detach().numpy(), loss.item(), jax.tree.unflatten(tree, [x.grad.numpy() for x in leaves])


def loss_of(graphdef, parameters, tokens, targets):
    """Mean loss by the head's own product, and the logits."""
    logits = trees.apply(graphdef, parameters)(tokens)
    here = targets[..., None] == jnp.arange(logits.shape[-1])[None, None]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(here, logits, 0), axis=-1)), logits


def records(m, rows=B):
    return np.random.default_rng(0).integers(0, m.V, (rows, T + 1))


def test_logits_and_all_gradients(build):
    """No activation and no weight is so near to a tie that float32 could round it otherwise."""
    graphdef, parameters = build(SMALL, seed=12)
    tokens, targets = records(SMALL)[:, :-1], records(SMALL)[:, 1:]
    TIES.clear()
    logits64, loss64, gradients64 = reference(SMALL, parameters, tokens, targets)
    assert min(TIES) > 1e-4, "too near to a tie for float32"
    step = jax.jit(jax.value_and_grad(lambda p: loss_of(graphdef, p, tokens, targets), has_aux=True))
    (loss, logits), gradients = step(parameters)
    assert np.std(logits64) > 0.3
    np.testing.assert_allclose(logits, logits64, atol=1e-5 * np.abs(logits64).max())
    np.testing.assert_allclose(loss, loss64, rtol=1e-6)
    expected = dict(jax.tree_util.tree_leaves_with_path(gradients64))
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        g64 = expected[path]
        assert np.abs(g64).max() > 1e-5, path
        np.testing.assert_allclose(g, g64, atol=2e-5 * np.abs(g64).max(), err_msg=jax.tree_util.keystr(path))
    frozen = jax.jit(lambda p: loss_of(graphdef, p, tokens, targets)[1])(trees.freeze(SMALL, parameters))
    np.testing.assert_array_equal(frozen, logits)
