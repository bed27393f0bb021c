"""`spectra analyze NAME`: one analysis of one's runs, or of the published numbers, as text, .csv and pictures."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectra_jax.analysis.html import number, shown
from spectra_jax.analysis.plots.style import save
from spectra_jax.analysis.sections import SECTIONS, Section
from spectra_jax.data.manifest import write_text
from spectra_jax.errors import UserError, one_of

ROWS = 40  # of a table that are printed


def analyze(name: str, folders: Sequence[str], out: Path | str | None = None, options: Mapping[str, Any] = {}) -> str:
    """The analysis as text; with `out`, its tables as .csv and its figures as .png in that folder.

    Args:
      options: those of the function in analysis/sections.py.

    Raises:
      UserError: an unknown analysis or option, as the analysis, or a folder that cannot be written.
    """
    function = SECTIONS[one_of(name, SECTIONS, "analysis")]
    known = [key for key in inspect.signature(function).parameters if key != "folders"]
    for key in options:
        if key not in known:
            raise UserError(f"--{key} is not an option of the analysis {name!r}"
                            + (f"; it has {', '.join('--' + key for key in known)}" if known else ""))
    section = function(folders, **options)
    written = write(section, Path(out)) if out is not None else []
    return "\n".join([as_text(section), *(["written: " + ", ".join(written)] if written else [])])


def as_text(section: Section) -> str:
    """Title, text and tables, long ones cut."""
    parts = [section.title, *([section.text.strip()] if section.text.strip() else [])]
    for name, table in section.tables.items():
        left_out = f"\n... {len(table) - ROWS} more rows; --out=DIR writes all" if len(table) > ROWS else ""
        text = shown(table.head(ROWS)).to_string(index=False, float_format=number, na_rep="-")
        parts.append(f"{name}\n{text}{left_out}")
    return "\n\n".join(parts)


def write(section: Section, out: Path) -> list[str]:
    """Writes a section's tables and figures into a folder; their names.

    Raises:
      UserError: it cannot be written.
    """
    names = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, table in section.tables.items():
            write_text(out / f"{name}.csv", table.to_csv(index=False, float_format="%.7g"), out)
            names.append(f"{name}.csv")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    for name, figure in section.figures.items():
        save(figure, out / f"{name}.png")
        names.append(f"{name}.png")
    return names


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("analyze")
