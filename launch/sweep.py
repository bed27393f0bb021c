"""Trains the rows of a sweep on several machines: each worker takes every so many of them.

Command:  python launch/sweep.py --sweep=configs/sweeps/schedule.py:1.1b --workdir=DIR --worker=0 --workers=4 \
              [--dry-run] [--config.SECTION.KEY=VALUE ...]

Run it once for each worker, with the same arguments but --worker=0, 1, ...; they share the workdir, or have one each.
Worker I takes every so many of the rows to train, counted from I, with the rows that are quantized from them, and of
these makes the ones that are not finished; no other worker does. The same command continues after a stop. When all are
done, `spectra sweep` with the same sweep, workdir and overrides finds every row finished, and writes the table and the
figure.
"""

import argparse
from pathlib import Path

from spectra_jax.cli import exit_status
from spectra_jax.errors import UserError
from spectra_jax.parser import CONFIG_PREFIX
from spectra_jax.sweep import FINISHED, check_row, read_rows, run_row, shares


def run(spec: str, workdir: Path, worker: int, workers: int, overrides: list[str], dry_run: bool) -> None:
    """Prints what becomes of every row, and makes this worker's.

    Raises:
      UserError: no such worker, a sweep or an override is wrong, a row is finished with another config (all before
        anything is trained), or a row cannot be trained.
    """
    if not 0 <= worker < workers:
        raise UserError(f"--worker={worker} of --workers={workers}: it must be from 0 to one less than the workers")
    rows = read_rows(spec, overrides)
    owners = shares(rows, workers)
    for row in (row for row, owner in zip(rows, owners) if owner == worker):
        if not dry_run or (workdir / row.name / FINISHED).is_file():
            check_row(row, workdir)
    for number, (row, owner) in enumerate(zip(rows, owners), 1):
        mine, finished = owner == worker, owner == worker and (workdir / row.name / FINISHED).is_file()
        fate = "skipped, finished" if finished else "taken" if mine else f"skipped, worker {owner}'s"
        print(f"row {number} of {len(rows)}: {row.name}: {fate}", flush=True)
        if mine and not finished and not dry_run:
            run_row(row, workdir)


def main() -> None:
    """Exit status as that of `spectra`: 0, 2 for an error of the user, 75 where a signal ended a row that resumes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sweep", required=True, metavar="FILE.py[:ARG]", help="sweep file and its argument")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the sweep: one subfolder per row")
    parser.add_argument("--worker", required=True, type=int, help="which of the workers this is, from 0")
    parser.add_argument("--workers", required=True, type=int, help="how many there are")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, train nothing")
    args, rest = parser.parse_known_args()
    if unknown := [text for text in rest if not text.startswith(CONFIG_PREFIX)]:
        parser.error(f"unknown argument {unknown[0]!r}")
    overrides = [text.removeprefix(CONFIG_PREFIX) for text in rest]
    with exit_status():
        run(args.sweep, args.workdir, args.worker, args.workers, overrides, args.dry_run)


if __name__ == "__main__":
    main()
