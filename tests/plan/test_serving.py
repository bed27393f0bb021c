"""Plans of generation against numbers worked out by hand."""

import pytest

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.plan.serving import bits_per_weight, serving

BLOCKS = 30 * (4 * 3072 * 3072 + 3 * 3072 * 9216)  # weights of the 3.9B model
HEAD = 50688 * 3072


def rows(text):
    lines = [line.split() for line in text.splitlines()]
    return {int(line[0]): [float(x.replace(",", "")) for x in line[1:4]] for line in lines if line[0].isdigit()}


def test_a_token_of_a_ternary_model():
    """2 bits a weight, head in 16, half a context of 2048 tokens of 2 x 30 x 3072 16-bit numbers, at 819 GB/s."""
    text = serving(configs.load("configs/trilm.py:3.9b"), ["v5e:2x2"])
    cache = 2 * 30 * 3072 * 2 * 2048
    for batch in (1, 8):
        seconds = (BLOCKS / 4 + HEAD * 2 + batch * cache / 2) / 819e9
        found = rows(text)[batch]
        assert found == pytest.approx([seconds * 1e3, 1 / seconds, 4 * batch / seconds], rel=2e-3)
    assert "3,680,501,760 at 2 bits" in text and "4 copies, each on 1 device" in text
    assert f"{int((15.75 * 2**30 - BLOCKS / 4 - HEAD * 4) // cache)} fit" in text


def test_widths():
    widths = {name: bits_per_weight(configs.load(name)) for name in ("configs/floatlm.py:99m", "configs/bilm.py:99m")}
    assert list(widths.values()) == [16, 1]
    assert bits_per_weight(configs.load("configs/quantlm.py:3bit")) == 3 + 32 / 128


def test_a_large_batch_is_bound_by_compute():
    text = serving(configs.load("configs/trilm.py:99m", ("data.T=16",)), ["h100:8"])
    assert text.splitlines()[4].endswith("memory") and text.splitlines()[-1].endswith("compute")


def test_what_does_not_fit_or_divide():
    config = configs.load("configs/floatlm.py:3.9b", ("model.L=90",))
    with pytest.raises(UserError, match=r"takes \d+\.\d GiB .* with one context.* share it among 2 devices"):
        serving(config, ["v5e:2x2"])
    with pytest.raises(UserError, match="config.mesh.model=3 does not divide the 4 devices"):
        serving(configs.load("configs/trilm.py:99m", ("mesh.model=3",)), ["v5e:2x2"])
