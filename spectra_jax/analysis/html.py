"""Sections as one self-contained HTML page: no scripts, nothing loaded from elsewhere, legible in print."""

import base64
import io
from collections.abc import Mapping
from html import escape

import pandas as pd
from matplotlib.figure import Figure

from spectra_jax.analysis.sections import Section

DOTS = 200  # for each inch of a figure
LONG = 40  # rows of a table that is not folded
SHORT = ("data", "tokenizer", "commit")  # columns of hashes
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.25em; margin-top: 2.2em; border-bottom: 1px solid #ccc; }
nav a { margin-right: 1em; } figure { display: inline-block; margin: 0.5em 1em 0.5em 0; vertical-align: top; }
figure img { max-width: 100%; height: auto; } figcaption, .note { color: #555; font-size: 0.87em; }
.scroll { overflow-x: auto; margin: 0.6em 0; } table { border-collapse: collapse; font-size: 0.8em; }
th, td { padding: 0.15em 0.6em; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e5e5; }
th { background: #f3f3f3; border-bottom: 1px solid #999; } td:first-child, th:first-child { text-align: left; }
pre { font-size: 0.8em; background: #f7f7f7; padding: 0.8em; overflow-x: auto; } summary { cursor: pointer; }
@media print { body { max-width: none; font-size: 11px; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; } details:not([open]) { display: none; } nav { display: none; } }
"""


def page(title: str, lead: str, sections: Mapping[str, Section], details: Mapping[str, str]) -> str:
    """A document.

    Args:
      lead: what stands under the title.
      sections: by their anchors. details: summary -> preformatted text, folded at the end.
    """
    links = "".join(f'<a href="#{escape(name)}">{escape(one.title)}</a>' for name, one in sections.items())
    body = "".join(_section(name, one) for name, one in sections.items())
    folded = "".join(
        f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
        for summary, text in details.items()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><p class="note">{escape(lead)}</p><nav>{links}</nav>{body}'
        + (f'<h2 id="configs">Configs</h2>{folded}' if folded else "") + "</body></html>\n"
    )


def _section(name: str, section: Section) -> str:
    figures = "".join(_figure(key, figure) for key, figure in section.figures.items())
    tables = "".join(_table(key, table) for key, table in section.tables.items())
    text = f"<p>{escape(section.text.strip())}</p>" if section.text.strip() else ""
    return f'<section id="{escape(name)}"><h2>{escape(section.title)}</h2>{text}{figures}{tables}</section>'


def _figure(name: str, figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DOTS)
    width, caption = round(figure.get_figwidth() * 130), escape(name.replace("_", " "))
    return (f'<figure><img alt="{caption}" width="{width}" src="data:image/png;base64,'
            f'{base64.b64encode(data.getvalue()).decode()}"><figcaption>{caption}</figcaption></figure>')


def _table(name: str, table: pd.DataFrame) -> str:
    """Long ones can be folded, and are, but for that of the runs."""
    title = escape(name.replace("_", " "))
    text = shown(table).to_html(index=False, border=0, na_rep="", float_format=number, escape=True)
    if len(table) <= LONG:
        return f'<h3>{title}</h3><div class="scroll">{text}</div>'
    state = "details open" if name == "runs" else "details"
    return f'<{state}><summary>{title}, {len(table):,} rows</summary><div class="scroll">{text}</div></details>'


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table of runs without what is in its other columns, hashes shortened."""
    found = table.drop(columns=[column for column in ("folder", "name") if column in table and "run" in table])
    return found.assign(**{column: found[column].str[:8] for column in SHORT if column in found})


def number(value: float | int) -> str:
    """Five digits; from 10,000 up whole."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"
