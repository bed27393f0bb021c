"""A tuned model is its start plus a file of 8 bytes a weight, to the last bit."""

import re

import numpy as np
import pytest
from helpers import ROOT, same_bits, state_on_disk, trained

from spectra_jax import cli
from spectra_jax.errors import UserError
from spectra_jax.serve.load import load
from spectra_jax.sparse_delta import added, apply, difference, extract
from spectra_jax.train.workdir import read_config

TUNED = ("optimizer.name=spiel", "optimizer.only=attention.,mlp.", "optimizer.spiel.density=0.2",
         "optimizer.spiel.every=4", "optimizer.spiel.collect=2")


def test_sums_of_float32_are_found_again():
    """A million sums of numbers of very different sizes, with signed zeros: p = w + d has a d that gives it back."""
    rng = np.random.RandomState(0)
    w, d = (
        (rng.standard_normal((2, 500, 1000)) * 2.0 ** rng.randint(-30, 30, (2, 500, 1000))).astype(np.float32)
        for _ in range(2)
    )
    d[0, :, ::3] = 0
    w[:, ::5], w[:, 1::5] = -0.0, 0.0
    w[:, 2::5] = np.float32(1) - d[:, 2::5]  # sums at a power of two
    new = w + d
    counts, indices, values = difference(w, new)
    assert indices.dtype == np.int32 and values.dtype == np.float32 and counts.sum() == len(indices) == len(values)
    assert counts.sum() == (w.view(np.int32) != new.view(np.int32)).sum() < w.size
    assert added(w, (counts, indices, values)).tobytes() == new.tobytes()


def test_what_is_no_sum_is_refused():
    old, new = np.full((1, 2, 2), 1.0, np.float32), np.full((1, 2, 2), np.float32(0.1), np.float32)
    with pytest.raises(UserError, match="mlp.up: 4 of 4 weights that differ are no float32 sum"):
        difference(old, new, "mlp.up")


def test_a_tuned_run_goes_through_a_file(tmp_path, capsys):
    start = trained()
    tuned, file = trained(f"train.start={start}", *TUNED), tmp_path / "delta.npz"
    cli.run(["delta", str(start), str(tuned), "--sparse", f"--out={file}"])
    count = int(re.search(r"npz: ([0-9,]+) weights of block", capsys.readouterr().out)[1].replace(",", ""))
    assert 1000 < count <= 0.2 * 18_432
    bytes_beside = file.stat().st_size - 8 * count
    assert 0 < bytes_beside < 20_000  # names of arrays, the config, checksums
    cli.run(["delta", str(start), str(file), "--sparse", f"--out={tmp_path / 'again'}"])
    assert same_bits(
        load(str(tmp_path / "again"), latent=None).parameters, load(str(tuned), latent=None).parameters
    )
    assert read_config(tmp_path / "again") == read_config(tuned)
    assert same_bits(
        load(f"{tmp_path / 'again'}@12", latent=None).parameters, state_on_disk(tuned, 12)["parameters"]
    )

    for wrong in ([], ["--sparse", f"--config={ROOT}/configs/delta.py"]):
        with pytest.raises(UserError, match=r"takes --config=configs/delta.py\[:PRESET\], or --sparse"):
            cli.run(["delta", str(start), str(tuned), *wrong, f"--out={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="delta.npz exists"):
        extract(str(start), str(tuned), file)
    with pytest.raises(UserError, match=r"was taken from .*, and .*@4 is another model: .* differ"):
        apply(f"{start}@4", file, tmp_path / "other")
    with pytest.raises(UserError, match=r"differs from .* in blocks.attention_norm.gain, .*; was it tuned from there"):
        extract(f"{start}@4", str(tuned), tmp_path / "other.npz")
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match="is no sparse delta, or damaged"):
        apply(str(start), file, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "delta.npz"], "nothing half-made is left"
