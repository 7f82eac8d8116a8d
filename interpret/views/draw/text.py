"""Tables as text for papers and spreadsheets: Markdown, LaTeX (booktabs), CSV.

Names come from data: each kind of text has one function that takes from them what it would read as its own.
"""

from __future__ import annotations

import csv
import io
import math
import re

from glassarmor.interpret.views.charts import Table

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

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# What a spreadsheet takes for a formula, unless it is no more than numbers.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_FORMULA, _NUMBERS = re.compile(r"[=+\-@\t\r\n]"), re.compile(r"[-+−–±.,%\d\s()\[\]eE]*")


def markdown_text(text: str) -> str:
    """As Markdown shows it letter by letter, in a line: no HTML, link, code, or end of a table's cell."""
    text = "".join(_HTML.get(c, f"\\{c}" if c in "\\`*|~" else c) for c in _one_line(text))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word it is no markup
    return re.sub(r"\](?=[(\[:])|^\s*(?=#|[+-]\s)|!(?=\[)", lambda found: f"{found[0].strip()}\\", text)


def latex_text(text: str) -> str:
    """As LaTeX sets it letter by letter, in a line."""
    return "".join(_LATEX.get(c, c) for c in _one_line(text))


def csv_text(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: what begins like one has an apostrophe in front."""
    guarded = f"'{text}" if _FORMULA.match(text.lstrip(" ")) and not _NUMBERS.fullmatch(text) else text
    return _HIDDEN.sub(" ", guarded)


def _one_line(text: str) -> str:
    """Without line ends and other control characters, those that turn the order of what is read among them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+", " ", text)


def _cell(value: str | float | int) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def markdown(table: Table) -> str:
    """A pipe table below its title; numbers to the right."""
    cells = [[_cell(row[i]) for row in table.rows] for i in range(len(table.columns))]
    numeric = [all(cell[:1] in "+-–0123456789[" for cell in column) for column in cells]
    lines = [tuple(map(markdown_text, table.columns)), tuple("---:" if right else "---" for right in numeric)]
    body = [
        tuple(markdown_text(_cell(value)) if isinstance(value, str) else _cell(value) for value in row) for row in table.rows
    ]
    return f"**{markdown_text(table.title)}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *body]) + "\n"


def latex(table: Table) -> str:
    """A ``tabular`` with booktabs rules; every character that LaTeX would read as its own is escaped."""

    def line(cells: tuple[str | float | int, ...]) -> str:
        return " & ".join(latex_text(_cell(cell)) for cell in cells) + r" \\"

    body = "\n".join(line(row) for row in table.rows)
    title = latex_text(table.title)
    columns = "l" + "r" * (len(table.columns) - 1)
    return (
        f"% {title}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(table.columns)}\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def comma_separated(table: Table) -> str:
    """Plain numbers; NaN is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(csv_text, table.columns))
    for row in table.rows:
        blank = ("" if isinstance(v, float) and math.isnan(v) else v for v in row)
        writer.writerow([csv_text(v) if isinstance(v, str) else v for v in blank])
    return text.getvalue()
