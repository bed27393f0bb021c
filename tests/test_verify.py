"""`spectra checkpoints` and `spectra verify` on a real run, whole and damaged."""

import pytest
from helpers import TERNARY, copy_of, spectra, trained

from spectra_jax import metrics
from spectra_jax.checkpoint import FOLDER
from spectra_jax.errors import UserError
from spectra_jax.verify import checkpoint_rows, table, verify


def test_a_whole_run():
    workdir = trained(*TERNARY)
    losses = {r["step"]: r["loss"] for r in metrics.read(workdir) if r["kind"] == "train"}
    rows = checkpoint_rows(workdir)
    assert [(row.step, row.full, row.tokens, row.fault) for row in rows] == [
        (step, True, 128 * step, "") for step in (4, 8, 12)
    ]
    for row in rows:
        assert row.bytes == sum(
            p.stat().st_size for p in (workdir / FOLDER / str(row.step)).rglob("*") if p.is_file()
        )
    assert verify(workdir) == f"3 checkpoints of {workdir}: every array is the one that was saved"
    assert verify(f"{workdir}@8") == f"1 checkpoint of {workdir}@8: every array is the one that was saved"
    lines = [line.split() for line in table(workdir).splitlines()]
    assert [(step, loss, *rest) for step, _, loss, _, *rest in lines] == [
        ("step", "loss", "holds", "verified"), *((str(n), f"{losses[n]:.4f}", "state", "yes") for n in (4, 8, 12))
    ]


def test_a_damaged_run(tmp_path):
    workdir = copy_of(trained(*TERNARY), tmp_path / "run")
    path = max((workdir / FOLDER / "8" / "parameters").glob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    (workdir / FOLDER / "12" / "record" / "record.json").write_text("{}")
    assert [(row.step, row.tokens, bool(row.fault)) for row in checkpoint_rows(workdir)] == [
        (4, 512, False), (8, 1024, True), (12, None, True)
    ]
    assert [line.split()[-1] for line in table(workdir).splitlines()] == ["verified", "yes", "no", "no"]
    done = spectra("verify", str(workdir))
    assert done.returncode == 2 and "2 of 3 checkpoints are damaged" in done.stderr
    assert f"{FOLDER}/8 is damaged: " in done.stderr and f"{FOLDER}/12 is damaged: " in done.stderr
    assert sorted(p.name for p in (workdir / FOLDER).iterdir()) == ["12", "4", "8"], "looking changes nothing"


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoints"):
        verify(tmp_path)
