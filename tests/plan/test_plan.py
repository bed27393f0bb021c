"""`spectra plan`, and what the compiled training step says to other devices: held, so that a change shows here."""

import pytest

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.plan import hlo, topology
from spectra_jax.plan.program import lowered
from spectra_jax.plan.report import plan
from spectra_jax.sharding import make_mesh

# Four layers, a small vocabulary: the program is that of all layers, for they are a loop (of two it would be none).
SMALL = ("model.L=4", "model.V=2048", "data.T=512", "data.batch=64", "model.remat=full", "train.steps=100")
WEIGHTS = 4 * (4 * 512 * 512 + 3 * 512 * 1280)  # of its blocks


def crossing(name, *overrides):
    config = configs.load("configs/trilm.py:99m", (*SMALL, *overrides))
    mesh = make_mesh(config, topology.devices(topology.parse(name)))
    return hlo.collectives(lowered(config, mesh).compile().as_text())


def total(found, *kinds, dtypes=None, above=0):
    chosen = [one for one in found if one.kind in kinds and (not dtypes or one.dtype in dtypes)]
    return sum(one.total for one in chosen if one.bytes > above)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides"), [("v5e:4x4", ()), ("v5p:4x4x4", ()), ("v5e:4x4*2", ("mesh.slice=2",))])
def test_what_a_step_says(name, overrides):
    """Codes of the blocks' weights at 2 bits, twice; the head in bfloat16, once; no other float."""
    found = crossing(name, *overrides)
    matrices = 2 * 2 * WEIGHTS  # bfloat16, forward and backward: what the plain path would gather
    codes = total(found, "all-gather", dtypes=("u8",))
    least = 0.9 if "*" not in name else 0.5  # the unrolled loop of two slices counts once: see hlo.py
    assert least * matrices / 8 <= codes <= matrices / 7
    assert total(found, "all-gather", dtypes=("bf16",)) == 2048 * 512 * 2
    assert total(found, "all-gather", dtypes=("f32", "s8"), above=65536) == 0
    # Gradients: libtpu makes rings of some, of others an all-reduce (no reduce-scatter); the head's once, in float32.
    # Of the embedding only rows are exchanged, forward and back.
    rows = 2 * 2 * 64 * 512 * 512 // {"v5e:4x4": 16, "v5p:4x4x4": 64, "v5e:4x4*2": 32}[name]
    sums = total(found, "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", above=4096)
    assert sums <= 1.1 * (2 * WEIGHTS + 2048 * 512 * 4 + rows) * (1 if name == "v5e:4x4" else 1.5)


@pytest.mark.slow
def test_a_table():
    """The state is 12 bytes a parameter; the total is what the compiler's parts add up to."""
    config = configs.load("configs/trilm.py:99m", SMALL)
    text = plan(config, ["v5e:4x4"], compile=True, price=1.5)
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith("TriLM trilm-99m on v5e:4x4: 16 chips, 16 devices (1 slice x 16 data x 1 model)")
    row = next(line for line in lines if line[0] == "memory")
    state, temporary, whole = (float(row[k]) for k in (1, row.index("+") + 1, row.index("=") + 1))
    assert state == pytest.approx(12 * (WEIGHTS + 2 * 2048 * 512) / 16 / 2**30, abs=0.006)
    assert whole == pytest.approx(state + temporary, abs=0.011) and 0 < temporary < 1
    assert ["all-gather", "u8"] in [line[:2] for line in lines]
    kept = next(line for line in lines if line[1:2] == ["bf16[4,4,512,512]"])  # every block's input
    assert float(kept[0]) == pytest.approx(4 * 4 * 512 * 512 * 2 / 1e6, abs=0.1) and "transformer.py:" in kept[2]
    assert "MFU at most" in text and "at 1.5 a chip-hour" in text


def test_lowering_alone_says_the_state():
    """12 bytes a parameter over 16 devices, of TPUs and of GPUs."""
    text = plan(configs.load("configs/trilm.py:99m", ("data.batch=16",)), ["v5e:4x4", "v6e:4x4", "h100:8*2"])
    assert text.count("0.07 GiB of state") == 3 and "--compile tells" in text


@pytest.mark.slow
def test_what_does_not_fit():
    """The compiler's own numbers, and a plan that fits."""
    config = configs.load("configs/trilm.py:99m", ("data.batch=512", "model.remat=none"))
    message = r"does not fit in 15.75 GiB. libtpu: .*G.* By arithmetic .* about [\d.]+ GiB: .*model.attention=splash"
    with pytest.raises(UserError, match=message):
        plan(config, ["v5e:2x2"], compile=True)


def test_a_state_that_does_not_fit():
    whole = configs.load("configs/trilm.py:3.9b", ("data.batch=16", "mesh.slice=16", "mesh.data=1"))
    message = r"the state alone is 44\.\d+ GiB a device .* has 15.75. .*--config.mesh.slice=1"
    with pytest.raises(UserError, match=message):
        plan(whole, ["v5e:4x4"])


def test_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match="is not divisible by the data axes .1 x 64.; use 576"):
        plan(configs.load("configs/trilm.py:3.9b"), ["v5p:4x4x4"])


def test_compiling_for_a_gpu_is_refused():
    with pytest.raises(UserError, match="to compile for a GPU takes one"):
        plan(configs.load("configs/trilm.py:99m", ("data.batch=16",)), ["h100:8"], compile=True)
