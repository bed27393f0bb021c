"""What stands above the progress of a run: its numbers against the arrays on the devices and the records of a run."""

import re
from functools import partial

import jax
import numpy as np
import pytest
from helpers import on_mesh, tiny

from spectra_jax.hardware import Peak
from spectra_jax.model.parameters import count, init_parameters
from spectra_jax.stored import abstract
from spectra_jax.train.describe import flops_per_token, mfu_formula, parameter_table


def evaluated(formula: str, tokens_per_second: float) -> float:
    """The right-hand side with the numbers, as a reader would type it into a calculator."""
    expression = formula.rsplit(" = ", 1)[1].replace("tokens/s", str(tokens_per_second)).replace(",", "")
    return eval(expression.replace(" x ", " * ").replace("TFLOP/s", "/ 1e12"))  # a / b / 1e12 = a / (b 1e12)


def test_the_mfu_formula():
    """A hundredth of the peak of 1e12, by 6 P + 12 L N H T with the matrices and the head of the tiny model."""
    config = tiny()
    P = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * 304
    flops = 6 * P + 12 * 2 * 4 * 8 * 16
    assert flops_per_token(config) == flops
    assert evaluated(mfu_formula(config, Peak(1e12, "")), 1e10 / flops) == pytest.approx(0.01)
    assert mfu_formula(config, Peak(None, "no peak is known")) == "no peak, no MFU"


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 1, 1)])
def test_the_table_of_parameters(shape):
    """Room on one device: what its shards take."""
    config, mesh = on_mesh(tiny(), *shape)
    with jax.set_mesh(mesh):
        shapes = abstract(jax.eval_shape(partial(init_parameters, config.model), jax.random.key(0)), mesh)
    arrays = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)
    lines = parameter_table(arrays).splitlines()
    assert parameter_table(shapes).splitlines() == lines
    leaves, here = jax.tree.leaves(arrays), jax.devices()[0]
    assert len(lines) == len(leaves) + 2 <= 15 and len({len(line) for line in lines}) == 1
    room = [sum(s.data.nbytes for s in leaf.addressable_shards if s.device == here) / 1e6 for leaf in leaves]
    found = [float(line.split()[-1]) for line in lines[1:]]
    np.testing.assert_allclose(found, [*room, sum(room)], atol=0.00501)
    assert lines[-1].split()[:2] == ["all", f"{count(config.model).total:,}"]
    (q,) = [line for line in lines if line.startswith("blocks/attention/q/w ")]
    assert re.split("  +", q)[1:5] == ["2 x 32 x 32", "float32", "P(None, data, model)", "2,048"]
