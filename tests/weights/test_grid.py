"""Matrices on a grid: what they stand for, what they do to their input, the bits they take; and any form on disk."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import environment

from spectra_jax.weights.form import describe, size_in_bits, skeleton
from spectra_jax.weights.frozen import Frozen, matmul
from spectra_jax.weights.grid import Grid
from spectra_jax.weights.masked import Masked

RNG = np.random.default_rng(0)
M, N, GROUPS = 24, 10, 4


def grid(**kind) -> Grid:
    """Drawn codes and scales, with zeros and a map of groups where they are asked for."""
    zeros = jnp.asarray(RNG.integers(0, 16, (GROUPS, N)), jnp.uint8) if kind.pop("zeros", False) else None
    groups = jnp.asarray(RNG.integers(0, GROUPS, M), jnp.int32) if kind.pop("groups", False) else None
    codes = RNG.integers(0, 16, (M, N)) - (0 if zeros is not None else 8)
    scales = jnp.asarray(RNG.uniform(0.1, 1, (GROUPS, N)), jnp.float16)
    return Grid(jnp.asarray(codes, jnp.int8 if zeros is None else jnp.uint8), scales, zeros, groups, bits=4, **kind)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_what_it_stands_for(zeros, groups):
    w = grid(zeros=zeros, groups=groups)
    of = np.asarray(w.groups) if groups else np.arange(M) // (M // GROUPS)
    codes = np.asarray(w.codes, np.float64) - (np.asarray(w.zeros, np.float64)[of] if zeros else 0)
    dense = codes * np.asarray(w.scales, np.float64)[of]
    np.testing.assert_allclose(w.dequantize(), dense, rtol=1e-6)
    x = RNG.standard_normal((3, 5, M))
    np.testing.assert_allclose(matmul(jnp.asarray(x, jnp.float32), w), x @ dense, rtol=1e-4, atol=1e-4)


def test_rounded_input():
    """Each token to 255 levels, but for the dims where some token reaches the threshold."""
    x = RNG.standard_normal((2, 4, M))
    x[1, 2, 7] = 9.0
    for threshold in (0.0, 6.0):
        w = grid(tokens8=True, threshold=threshold)
        large = (np.abs(x) >= threshold).any((0, 1)) if threshold else np.zeros(M, bool)
        rest = np.where(large, 0, x)
        step = np.abs(rest).max(-1, keepdims=True) / 127
        expected = np.where(large, x, np.round(rest / step) * step)
        np.testing.assert_allclose(w.activation(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)
        assert large.sum() == (threshold > 0)


def test_bits():
    w = grid(zeros=True, groups=True)
    assert w.stored_bits() == 4 * M * N + (16 + 4) * GROUPS * N + 32 * M
    assert w.paper_bits() == 4 * M * N + 32 * GROUPS * N
    one = Grid(w.codes, w.scales[:1], bits=4)
    assert (one.stored_bits(), one.paper_bits()) == (4 * M * N + 16 * N, 4 * M * N)
    model = {"embedding": jnp.zeros((7, 3)), "norm": {"gain": jnp.zeros(3)}, "w": one}
    assert size_in_bits(model) == (one.stored_bits() + 16 * 24, one.paper_bits() + 16 * 21)
    ternary = Frozen(jnp.zeros((2, 4, 6), jnp.int8), jnp.zeros((2, 3)), 1)
    assert (ternary.stored_bits(), ternary.paper_bits()) == (2 * 48 + 32 * 6, 1.58 * 48)


def test_forms_are_rebuilt_from_their_description():
    """A tree of forms, nested and with parts left out, from JSON-ready values and its arrays alone."""
    mask = jnp.asarray(RNG.random((M, N)) < 0.5)
    tree = {"a": {"w": grid(zeros=True)}, "b": {"w": Masked(mask, grid(tokens8=True), grid(groups=True))},
            "gain": jnp.ones(3)}
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf
              for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    like = {"a": {"w": "A"}, "b": {"w": "B"}, "gain": "G"}
    again = skeleton(describe(tree), leaves, like, lambda entry, leaf: entry)
    assert again["gain"] == "G"
    again["gain"] = tree["gain"]
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree)))


def test_loading_knows_every_form():
    """In a process that has not quantized anything."""
    code = "import spectra_jax.serve.load; from spectra_jax.weights.form import FORMS; print(sorted(FORMS))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    known = ["Bits", "ByteScales", "Codebook", "Delta", "Frozen", "Gathered", "Grid", "LowRank", "Masked",
             "Normalised", "Shifted", "Tables"]
    assert done.stdout.strip() == str(known)
