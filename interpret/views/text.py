"""Tables as text for papers and spreadsheets: Markdown, LaTeX (booktabs), CSV."""

from __future__ import annotations

import csv
import io
import math

from interpret.views.view import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: rf"\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "²": r"$^2$",
    "·": r"$\cdot$",
    "–": "--",
    "<": r"$<$",
    ">": r"$>$",
}


def _cell(value: str | float | int) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def markdown(table: Table) -> str:
    """A pipe table below its title; numbers to the right."""
    cells = [[_cell(row[i]) for row in table.rows] for i in range(len(table.columns))]
    numeric = [all(cell[:1] in "+-–0123456789[" for cell in column) for column in cells]
    lines = [table.columns, tuple("---:" if right else "---" for right in numeric)]
    body = [tuple(_cell(value).replace("|", "\\|") for value in row) for row in table.rows]
    return f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *body]) + "\n"


def latex(table: Table) -> str:
    """A ``tabular`` with booktabs rules; every character that LaTeX would read as its own is escaped."""

    def line(cells: tuple[str | float | int, ...]) -> str:
        return " & ".join("".join(_LATEX.get(c, c) for c in _cell(cell)) for cell in cells) + r" \\"

    body = "\n".join(line(row) for row in table.rows)
    title = "".join(_LATEX.get(c, c) for c in table.title)
    columns = "l" + "r" * (len(table.columns) - 1)
    return (
        f"% {title}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(table.columns)}\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def comma_separated(table: Table) -> str:
    """Plain numbers; NaN is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(["" if isinstance(v, float) and math.isnan(v) else v for v in row] for row in table.rows)
    return text.getvalue()
