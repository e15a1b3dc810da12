"""Parts of an HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0b6e8f", "#d1652a", "#4b7f3a", "#7b4b94", "#a8862b", "#5b6770", "#b23a5e", "#2b4c9b")
STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#1c2327;background:#fff;margin:0 auto;
max-width:60rem;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0 1rem}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
figure{margin:1rem 0 1.5rem}
figure svg{display:block;width:100%;height:auto}
figcaption{color:#4a555c;font-size:.9rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;text-align:left;border-bottom:1px solid #dde3e6;
white-space:nowrap}
thead th{border-bottom:2px solid #1c2327}
td.number,th.number{text-align:right}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.5rem 1rem}
dt{color:#4a555c;font-size:.85rem}
dd{margin:0;font-weight:600;overflow-wrap:anywhere}
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of short cells under a title; numbers should come formatted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""


def write_page(target: Path, *, title: str, parts: Sequence[str]) -> Path:
    """Write a page atomically; equal inputs give equal bytes.

    Args:
        title: headline.
        parts: HTML below the headline; empty ones are left out.
    """
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, [f"<h1>{html.escape(title)}</h1>", *parts]))
        + "\n</body></html>\n"
    )
    staged = target.with_name(f".{target.name}.partial")
    staged.write_text(page, "utf-8")
    staged.replace(target)
    return target


def facts_html(facts: Mapping[str, object]) -> str:
    """Names with their values, side by side."""
    items = "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(short_text(value))}</dd></div>"
        for name, value in facts.items()
    )
    return f"<dl>{items}</dl>" if items else ""


def table_html(table: Table) -> str:
    """Columns that hold only numbers are set to the right."""
    numeric = [all(_is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]
    head = "".join(_cell("th", c, n) for c, n in zip(table.columns, numeric, strict=True))
    body = "".join(
        "<tr>" + "".join(_cell("td", c, n) for c, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>{note}"
    )


def figure_html(title: str, svg: str, *, alt: str) -> str:
    """A chart under a title; `alt` says it to those who cannot see it, and stands below."""
    labelled = svg.replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" ', 1
    )
    return (
        f"<h2>{html.escape(title)}</h2>\n<figure>{labelled}"
        f"<figcaption>{html.escape(alt)}</figcaption></figure>"
    )


def draw_svg(
    draw: Callable[[Figure], None], *, salt: str, size: tuple[float, float] = (7.2, 3.8)
) -> str:
    """A chart as inline SVG without dates or random ids.

    Args:
        draw: draws on the empty figure.
        salt: what the ids in the SVG are made of; another for every chart of a page.
        size: inches.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 13,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def short_text(value: object) -> str:
    """Numbers with four digits and thousands told apart."""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < math.inf else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cell(tag: str, value: object, number: bool) -> str:
    kind = ' class="number"' if number else ""
    return f"<{tag}{kind}>{html.escape(short_text(value))}</{tag}>"


def _is_number(value: object) -> bool:
    text = str(value).strip()
    return text[:1].isdigit() or (text[:1] in "-+." and text[1:2].isdigit())
