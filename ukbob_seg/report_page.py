"""Self-contained HTML reports: one file, pictures inlined, no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root{--ink:#1d2733;--soft:#5d6b7a;--line:#d9dfe6;--back:#fff;--tint:#f4f7fa;--accent:#1f6feb}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ef;--soft:#9aa7b5;--line:#36414e;--back:#14191f;--tint:#1c232b}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:1100px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
p.lead{color:var(--soft);margin-top:0}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.25rem .55rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{background:var(--tint);position:sticky;top:0}
figure{margin:1rem 0}figure img{max-width:100%;background:#fff;border-radius:4px}figcaption{color:var(--soft)}
.tiles{display:flex;flex-wrap:wrap;gap:1rem}.tile{background:var(--tint);border-radius:6px;padding:.6rem 1rem}
.tile b{display:block;font-size:1.4rem}code{background:var(--tint);padding:0 .25em}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--accent)}
"""


class ReportPage:
    """Collects headings, text, tables and figures, then writes them as one HTML file."""

    def __init__(self, title: str, lead: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{html.escape(lead)}</p>')

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add plain text."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def bullets(self, items: Sequence[str]) -> None:
        """Add a list of plain sentences."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>")

    def tiles(self, values: Sequence[tuple[str, str]]) -> None:
        """Add headline figures as (label, value)."""
        cells = "".join(f'<div class="tile">{html.escape(k)}<b>{html.escape(v)}</b></div>' for k, v in values)
        self._parts.append(f'<div class="tiles">{cells}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], folded: str = "") -> None:
        """Add a table; floats are printed with three decimals, NaN as a dash.

        Args:
            header: of the columns.
            rows: cells.
            folded: a title; the table is then shown only when the reader opens it.
        """
        head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        if folded:
            table = f"<details><summary>{html.escape(folded)}</summary>{table}</details>"
        self._parts.append(table)

    def figure(self, figure: Figure, caption: str = "") -> None:
        """Inline a matplotlib figure as PNG."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        self._parts.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def link(self, text: str, target: str) -> None:
        """Add a link to a file beside this one."""
        self._parts.append(f'<p><a href="{html.escape(target)}">{html.escape(text)}</a></p>')

    def write(self, path: Path) -> None:
        """Write the page atomically."""
        write_text(
            path,
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head><body>"
            + "\n".join(self._parts)
            + "</body></html>\n",
        )


def _cell(value: object) -> str:
    if isinstance(value, float):
        if value != value:
            return "-"
        return "inf" if value in (float("inf"), float("-inf")) else f"{value:.3f}"
    return html.escape(str(value))
