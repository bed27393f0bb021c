"""The benchmark runs here, and a wrong product does not pass it."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import api, bench, gpu


def test_quick(capsys):
    assert bench.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    names = ["dense", *bench.served([], jnp.ones((1, 512)), bench.draw(0, 512, 1280))]
    assert "xla" in names
    assert [(row["m"], row["n"], row["M"], row["name"]) for row in found["rows"]] == [
        (512, 1280, M, name) for M in (1, 8) for name in names
    ]
    for i, row in enumerate(found["rows"]):
        dense, bits = found["rows"][i - i % len(names)], 32 if row["name"] == "dense" else 2
        assert row["of dense"] == pytest.approx(dense["microseconds"] / row["microseconds"])
        assert row["GB/s"] == pytest.approx(512 * 1280 * bits / 8 / row["microseconds"] / 1e3)
        assert row["of copy"] == pytest.approx(row["GB/s"] / found["copy GB/s"])
        assert row["right"] and 0 < row["error"] < 2e-4
    assert sum(line.startswith("   512 x 1280") for line in lines) == len(found["rows"])


@pytest.mark.parametrize("wrong", [lambda y: y.at[0].multiply(1.01), lambda y: y.at[1, 5].set(jnp.nan)])
def test_a_wrong_product_is_seen(wrong):
    """A row that is a hundredth off, and a NaN in an output that is not among those compared."""
    weights, x = bench.draw(0, 64, 1100), jax.random.normal(jax.random.key(0), (4, 64))
    right = bench.packed("xla")
    assert bench.error(right, x, weights) <= bench.BOUND["float32"]
    broken = replace(right, product=lambda x, w: wrong(api.ternary_matmul(x, w)))
    assert not bench.error(broken, x, weights) <= bench.BOUND["float32"]


def test_matrices_of_a_loop_differ():
    draws = [bench.draw(seed, 256, 128).codes() for seed in (0, 1)]
    assert abs(jnp.mean(draws[0] == draws[1]) - 1 / 3) < 0.02
    assert abs(jnp.mean(draws[0] == 0) - 1 / 3) < 0.02


def test_sweep():
    """Other blocks than the chosen one, each of which computes the product."""
    weights, x = bench.draw(0, 1024, 512), jax.random.normal(jax.random.key(0), (16, 1024))
    contenders = bench.sweep(16, 1024, 512)
    blocks = [contender.product.keywords["block"] for contender in contenders]
    assert len(blocks) >= 6 and len({contender.name for contender in contenders}) == len(blocks)
    assert gpu.choose(16, 1024, 512) not in blocks
    for contender in contenders[:1] + contenders[-1:]:
        product = contender.product
        contender = replace(contender, product=lambda x, w, product=product: product(x, w, interpret=True))
        assert bench.error(contender, x, weights) < bench.BOUND["float32"]
    above = bench.sweep(gpu.CROSSOVER + 1, 1024, 512)
    assert above[-1].name == "gpu, kernel" and above[-1].product.keywords["block"] is not None


def test_bad_arguments(capsys):
    for argument, message in {
        "--shapes=7b": "there is no '7b'; there are 3.9b, 8b, 70b",
        "--implementations=gpuu": "there is no 'gpuu'; there are",
        "--sweep": "it needs an NVIDIA GPU, and the default device is cpu",
    }.items():
        with pytest.raises(SystemExit):
            bench.main([argument])
        assert message in capsys.readouterr().err
