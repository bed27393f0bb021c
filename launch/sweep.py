"""Trains the rows of a sweep on several machines: each worker takes every so many of them.

Command:  python launch/sweep.py --sweep=configs/sweeps/schedule.py:1.1b --workdir=DIR --worker=0 --workers=4 \
              [--dry-run] [--config.SECTION.KEY=VALUE ...]

Run it once for each worker, with the same arguments but --worker=0, 1, ...; they share the workdir, or have one each.
Worker I takes the rows whose index is I modulo the number of workers, which no other worker does, and of these trains
the ones that are not finished. The same command continues after a stop. When all are done, `spectra sweep` with the
same sweep, workdir and overrides finds every row finished, and writes the table and the figure.
"""

import argparse
import json
from pathlib import Path

import jax

from spectra_jax.cli import exit_status
from spectra_jax.data.manifest import write_text
from spectra_jax.errors import UserError
from spectra_jax.parser import CONFIG_PREFIX
from spectra_jax.sweep import FINISHED, read_rows
from spectra_jax.train.loop import train
from spectra_jax.train.workdir import config_changes


def run(spec: str, workdir: Path, worker: int, workers: int, overrides: list[str], dry_run: bool) -> None:
    """Prints what becomes of every row, and trains this worker's.

    Raises:
      UserError: no such worker, a sweep or an override is wrong, a row is finished with another config (all before
        anything is trained), or a row cannot be trained.
    """
    if not 0 <= worker < workers:
        raise UserError(f"--worker={worker} of --workers={workers}: it must be from 0 to one less than the workers")
    rows = read_rows(spec, overrides)
    for name, config in rows[worker::workers]:
        if (workdir / name / FINISHED).is_file() and (changes := config_changes(workdir / name, config)):
            raise UserError(f"{workdir / name} is finished with another config:\n  " + "\n  ".join(changes))
    for index, (name, config) in enumerate(rows):
        folder, mine = workdir / name, index % workers == worker
        finished = mine and (folder / FINISHED).is_file()
        fate = "skipped, finished" if finished else "taken" if mine else f"skipped, worker {index % workers}'s"
        print(f"row {index + 1} of {len(rows)}: {name}: {fate}", flush=True)
        if mine and not finished and not dry_run:
            result = {"name": name, **train(config, folder)}
            try:
                write_text(folder / FINISHED, json.dumps(result, indent=1) + "\n", folder)
            except OSError as error:
                raise UserError(f"cannot write {folder / FINISHED}: {error.strerror}; make room and repeat") from error
            jax.clear_caches()  # the next row compiles its own programs


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
