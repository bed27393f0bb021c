"""`spectra verify` and `spectra checkpoints`: what a run has saved, and whether all of it is still what was saved."""

from dataclasses import dataclass
from pathlib import Path

from spectra_jax import metrics
from spectra_jax.checkpoint import Checkpoints, Damaged
from spectra_jax.errors import UserError
from spectra_jax.progress import human


@dataclass(frozen=True)
class Row:
    """One checkpoint. `fault` says what is wrong with it, "" if nothing is; `loss` is the last one recorded by then."""

    step: int
    tokens: int | None
    loss: float | None
    bytes: int
    fault: str


def checkpoint_rows(workdir: Path | str) -> list[Row]:
    """Reads every checkpoint of a run and compares it with its checksums.

    Raises:
      UserError: the folder holds no checkpoints.
    """
    checkpoints, rows = Checkpoints(workdir), []
    losses = {r["step"]: r["loss"] for r in metrics.read(workdir) if r["kind"] == "train"}
    for step in checkpoints.steps():
        tokens, fault = None, ""
        try:
            tokens = checkpoints.record(step).get("tokens")
            checkpoints.verify(step)
        except Damaged as error:
            fault = str(error)
        before = [done for done in losses if done <= step]
        rows.append(Row(step, tokens, losses[max(before)] if before else None, checkpoints.size(step), fault))
    checkpoints.close()
    return rows


def table(workdir: Path | str) -> str:
    """One line per checkpoint: step, tokens, training loss, size, whether its checksums hold."""
    rows = checkpoint_rows(workdir)
    if not rows:
        raise UserError(f"{workdir} has no checkpoints yet")
    lines = [f"{'step':>10} {'tokens':>9} {'loss':>8} {'bytes':>9}  verified"]
    for row in rows:
        tokens = "-" if row.tokens is None else human(row.tokens)
        loss = "-" if row.loss is None else f"{row.loss:.4f}"
        lines.append(f"{row.step:>10,} {tokens:>9} {loss:>8} {human(row.bytes):>9}  {'no' if row.fault else 'yes'}")
    return "\n".join(lines)


def verify(workdir: Path | str) -> str:
    """What `spectra verify` prints where every checkpoint is sound.

    Raises:
      UserError: some are not; each is named with what is wrong.
    """
    rows = checkpoint_rows(workdir)
    if faults := [row.fault for row in rows if row.fault]:
        raise UserError("\n".join([*faults, f"{len(faults)} of {len(rows)} checkpoints are damaged"]))
    return f"{len(rows)} checkpoints of {workdir}: every array is the one that was saved"


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("verify")
