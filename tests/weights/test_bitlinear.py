"""BitLinear with its gain against PyTorch in float64 (arXiv 2406.02528), and as a stored form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import drawn, logits, same_bits, trained

from spectra_jax.analysis import dynamics, weights
from spectra_jax.errors import UserError
from spectra_jax.interop import hf
from spectra_jax.serve.generate import Generator
from spectra_jax.serve.load import load
from spectra_jax.serve.pack import pack
from spectra_jax.weights import get_rule
from spectra_jax.weights.bitlinear import Gained, Normalised
from spectra_jax.weights.form import size_in_bits
from spectra_jax.weights.frozen import Frozen, matmul
from spectra_jax.weights.packed import Bits
from spectra_jax.weights.prepared import prepare
from spectra_jax.weights.rule import Shards

RULE, SHARDS = get_rule("bitlinear"), Shards()
M, N, TOKENS = 20, 12, 6
RUN = ("model.weight=bitlinear", "model.quantized_head=True")


def latent(seed=0):
    rng = np.random.default_rng(seed)
    return Gained(
        jnp.asarray(0.05 * rng.standard_normal((M, N)), jnp.float32), jnp.asarray(rng.uniform(0.5, 2, M), jnp.float32)
    )


def test_product_and_gradients():
    """Straight through both roundings: of the input to the gain and through the norm, of the matrix to the latent."""
    w, rng = latent(), np.random.default_rng(1)
    x, target = (rng.standard_normal((TOKENS, n)).astype(np.float32) for n in (M, N))
    theirs = [torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (x, w.w, w.gain)]
    x64, w64, gain64 = theirs
    normal = x64 / torch.sqrt((x64**2).mean(-1, keepdim=True) + 1e-6) * gain64
    s = 127 / normal.abs().amax(-1, keepdim=True)
    codes = normal * s
    assert (0.5 - (codes - codes.round()).abs()).min() > 1e-4, "too near to a tie for float32"
    xq = normal + (torch.clamp(codes.round(), -128, 127) / s - normal).detach()
    mean = w64.abs().mean()
    wq = w64 + (torch.clamp((w64 / mean).round(), -1, 1) * mean - w64).detach()
    expected = (torch.tanh(xq @ wq) ** 2 * torch.tensor(target)).sum()
    expected.backward()

    def loss(x, w):
        return jnp.sum(jnp.tanh(product(x, w)) ** 2 * target)

    value, (dx, dw) = jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.asarray(x), w)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for found, reference in zip((dx, dw.w, dw.gain), theirs):
        grad = reference.grad.numpy()
        np.testing.assert_allclose(found, grad, atol=1e-5 * np.abs(grad).max())


def product(x, w):
    """As `Linear` has it."""
    statistics = RULE.statistics([w], SHARDS)
    return matmul(RULE.activation(x, w), RULE.effective(w, statistics, SHARDS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stored_form_gives_the_bits_of_training(dtype):
    w, x = latent(), jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, M)), dtype)
    # Jitted as training is: op by op, XLA rounds the last bit of the scale otherwise.
    frozen = jax.jit(lambda w: RULE.freeze(w, RULE.statistics([w], SHARDS), SHARDS))(w)
    assert isinstance(frozen, Normalised) and isinstance(frozen.core, Frozen)
    trained, stored = jax.jit(product)(x, w), jax.jit(lambda x, w: matmul(RULE.activation(x, w), w))(x, frozen)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, trained)
    assert frozen.stored_bits() == 2 * M * N + 32 + 32 * M
    assert frozen.paper_bits() == 1.58 * M * N and frozen.weights == M * N


def test_scales_are_bitnets():
    """The rule adds a gain and changes nothing else."""
    w, plain = latent(), get_rule("bitnet158")
    ours, theirs = RULE.statistics([w, latent(1)], SHARDS), plain.statistics([w.w, latent(1).w], SHARDS)
    np.testing.assert_array_equal(ours.scale, theirs.scale)
    np.testing.assert_array_equal(RULE.codes(w, ours, SHARDS), plain.codes(w.w, theirs, SHARDS))
    begun = RULE.latent(w.w, SHARDS)
    np.testing.assert_array_equal(begun.gain, np.ones(M))
    assert RULE.matrix(begun) is w.w and RULE.with_matrix(w, w.w + 1).gain is w.gain and RULE.learned(M, N) == M


def test_a_run(tmp_path):
    """Trained, kept with its gains, frozen, packed to files and into kernels: always the same model."""
    run = trained(*RUN)
    one = jax.devices()[:1]
    kept = load(str(run), latent=True, devices=one).parameters
    gains = kept["blocks"]["mlp"]["up"]["w"].gain
    assert isinstance(kept["head"], Gained) and np.std(gains) > 1e-3, "the gains have learned nothing"
    tokens = np.random.default_rng(0).integers(0, 290, (2, 12))
    expected = logits(run, tokens)
    pack(str(run), tmp_path / "packed", dtype="float32")
    np.testing.assert_allclose(logits(tmp_path / "packed", tokens), expected, atol=1e-5)  # scales of another machine
    small, frozen = (load(str(path)).parameters for path in (tmp_path / "packed", run))
    assert same_bits(small, frozen) and size_in_bits(small) == size_in_bits(frozen)
    texts = [
        [row.tokens for row in Generator(load(str(run), devices=one), weights=weights).generate(
            ["the whale", "a captain said"], max_new_tokens=6, temperature=0)]
        for weights in ("dense", "packed")
    ]
    assert texts[0] == texts[1]


def test_kernels_get_every_matrix_and_the_norms_stay():
    """Packed products are as near as 16-bit activations are."""
    model = load(str(trained(*RUN)), devices=jax.devices()[:1])
    with jax.set_mesh(model.mesh):
        ready, implementation = prepare(model.parameters, "xla")
        assert implementation == "xla"
        form, before = ready["blocks"]["mlp"]["up"]["w"], model.parameters["blocks"]["mlp"]["up"]["w"]
        assert isinstance(form, Normalised) and not isinstance(form.core, Frozen) and form.gain is before.gain
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 32)), jnp.float32)
        first = lambda w: jax.tree.map(lambda a: a[0], w)  # noqa: E731
        mine, expected = (np.asarray(matmul(x, first(w))) for w in (form, before))
    np.testing.assert_allclose(mine, expected, atol=2e-4 * np.abs(expected).max())


def test_packed_arrays_of_a_form_within_a_form(tmp_path):
    """On the disk codes take 2 bits."""
    from spectra_jax.weights import packed

    model = load(str(trained(*RUN)), devices=jax.devices()[:1])
    with jax.set_mesh(model.mesh):
        small = packed.pack(model.parameters)
    assert isinstance(small["blocks"]["attention"]["q"]["w"].matrix.codes, Bits)


def test_analysis_sees_the_matrices():
    """Latent weights are the matrices alone; there is no form without one."""
    run = trained(*RUN)
    kept = load(str(run), latent=True, devices=jax.devices()[:1]).parameters
    table = weights.table(run)
    row = table[(table["kind"] == "mlp.up") & (table["layer"] == 1)].iloc[0]
    w = np.asarray(kept["blocks"]["mlp"]["up"]["w"].w[1], np.float64)
    assert row["std"] == pytest.approx(w.std()) and row["scale"] == pytest.approx(np.abs(w).mean(), rel=1e-5)
    moved = dynamics.updates(run)
    assert moved["latent_max"].min() > 0 and moved["flips"].between(0, 1).all()


def test_exports_refuse_its_norms(tmp_path):
    with pytest.raises(UserError, match="bitlinear has a norm before every matrix, which Llama's code does not know"):
        hf.export(str(trained(*RUN)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gains_are_drawn_about_one():
    """Helpers of other tests find them by name."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), latent())
    assert abs(float(drawn(shapes).gain.mean()) - 1) < 0.2
