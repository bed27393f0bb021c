"""`spectra report RUN...`: everything known of some runs in one HTML file that can be mailed around."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from spectra_jax import config as configs
from spectra_jax.analysis import axes, runs, sections
from spectra_jax.analysis.html import page
from spectra_jax.analysis.sections import Section
from spectra_jax.data.manifest import write_text
from spectra_jax.errors import UserError
from spectra_jax.record import git_commit
from spectra_jax.stored import parse_checkpoint
from spectra_jax.train.workdir import read_config

# What is asked of the runs, in this order; an analysis that they do not suffice for says why in its place.
FACTS = ("run", "family", "parameters", "bits_per_weight", "stored_bits", "tokens", "loss", "loss_se", "bits_per_byte",
         "seed", "step", "data", "tokenizer", "commit")
ASKED = ("training", "suite", "weights", "dynamics")


def report(folders: Sequence[str], out: Path | str = "report.html", *, title: str = "", dynamics: str = "") -> str:
    """Writes the page; what it says of itself.

    Args:
      title: by default the names of the folders.
      dynamics: the run whose checkpoints are looked into; by default the first that kept three or more, a TriLM if
        there is one.

    Raises:
      UserError: no such runs, damaged files, or a file that cannot be written.
    """
    out = Path(out)
    if out.suffix != ".html":
        raise UserError(f"--out={out}: a report is one file, such as report.html")
    found = runs.expand(folders)
    table = runs.table(found)
    moving = dynamics or min(filter(_moves, found), key=_preference, default="")
    parts = {"runs": Section("Runs", _provenance(table), {"runs": table[[*FACTS]]})}
    for name in (*ASKED, *(["axes"] if any(map(axes.is_measured, found)) else [])):
        of = ([moving] if moving else []) if name == "dynamics" else found
        try:
            parts[name] = sections.SECTIONS[name](of)
        except UserError as error:
            parts[name] = Section(name.capitalize(), f"Left out: {error}.")
    parts["suite"].tables.pop("runs", None)  # it is the page's first table
    lead = (f"{len(found)} runs; written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by spectra_jax at commit "
            f"{git_commit()[:12]}. Losses are in nats per token on held-out text.")
    text = page(title or "Runs: " + ", ".join(Path(folder).name for folder in folders), lead, parts, _configs(found))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text, out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    return f"{out}: {len(found)} runs, {len(text) / 1e6:.1f} MB"


def _moves(run: str) -> bool:
    folder, step = parse_checkpoint(run)
    kept = [path for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    return step is None and runs.is_trained(run) and len(kept) >= 3


def _preference(run: str) -> bool:
    return read_config(parse_checkpoint(run)[0]).model.weight != "ternary"


def _provenance(table) -> str:
    kinds = [(name, table[name].nunique()) for name in ("data", "tokenizer", "commit")]
    mixed = [f"{count} different {name}s" for name, count in kinds if count > 1 and name != "data"]
    mixed += ["different training data"] if table["data"].nunique() > 1 else []
    return ("Beware: these runs have " + ", ".join(mixed) + "; their losses may be on no common scale."
            if mixed else "All of the same training data and tokenizer, by one commit.")


def _configs(found: Sequence[str]) -> dict[str, str]:
    """The first run's config whole, and of the others what differs from it."""
    first = read_config(parse_checkpoint(found[0])[0])
    texts = {f"{found[0]}: everything": json.dumps(configs.to_dict(first), indent=1)}
    for run in found[1:]:
        changes = configs.differences(first, read_config(parse_checkpoint(run)[0]))
        texts[f"{run}: {len(changes)} values differ from the first's"] = "\n".join(changes)
    return texts


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("report")
