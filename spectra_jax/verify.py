"""`spectra verify` and `spectra checkpoints`: what a run has saved, and whether all of it is still what was saved."""

from dataclasses import dataclass
from pathlib import Path

from spectra_jax import metrics, stored
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.errors import UserError
from spectra_jax.progress import human
from spectra_jax.record import Damaged


@dataclass(frozen=True)
class Row:
    """One checkpoint. `full`: training can go on from it. `fault` says what is wrong with it, "" if nothing is."""

    step: int
    full: bool | None
    tokens: int | None
    bytes: int
    fault: str


def checkpoint_rows(run: Path | str) -> list[Row]:
    """Reads every checkpoint of WORKDIR, or the one of WORKDIR@STEP, and compares it with its checksums.

    Raises:
      UserError: there are none.
    """
    workdir, chosen = stored.parse_checkpoint(str(run))
    checkpoints, rows = Checkpoints(workdir), []
    for step in checkpoints.chosen(chosen):
        tokens, full, fault = None, None, ""
        try:
            record = stored.record_of(checkpoints.path(step))
            tokens, full = record.get("tokens"), "training" in record["arrays"]
            stored.verify(checkpoints.path(step))
        except Damaged as error:
            fault = str(error)
        rows.append(Row(step, full, tokens, stored.size(checkpoints.path(step)), fault))
    checkpoints.close()
    return rows


def table(run: Path | str) -> str:
    """One line per checkpoint: step, tokens, training loss, size, what it holds, whether its checksums hold."""
    rows, workdir = checkpoint_rows(run), stored.parse_checkpoint(str(run))[0]
    records = metrics.read(workdir) if (workdir / metrics.FILE).exists() else []  # an imported run has none
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
    lines = [f"{'step':>10} {'tokens':>9} {'loss':>8} {'bytes':>9}  {'holds':<7}  verified"]
    for row in rows:
        tokens = "-" if row.tokens is None else human(row.tokens)
        before = [loss for step, loss in losses.items() if step <= row.step and loss is not None]
        loss = f"{before[-1]:.4f}" if before else "-"
        holds = "-" if row.full is None else "state" if row.full else "weights"
        lines.append(
            f"{row.step:>10,} {tokens:>9} {loss:>8} {human(row.bytes):>9}  {holds:<7}  {'no' if row.fault else 'yes'}"
        )
    return "\n".join(lines)


def verify(run: Path | str) -> str:
    """What `spectra verify` prints where every checkpoint is sound.

    Raises:
      UserError: some are not; each is named with what is wrong.
    """
    rows = checkpoint_rows(run)
    if faults := [row.fault for row in rows if row.fault]:
        raise UserError("\n".join([*faults, f"{len(faults)} of {len(rows)} checkpoints are damaged"]))
    return f"{len(rows)} checkpoint{'s' * (len(rows) > 1)} of {run}: every array is the one that was saved"


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("verify")
