"""What the scripts say in the terminal: one-line errors, and the final table."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Final
from unicodedata import category

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from glassarmor.interpret.views.charts import Table
from glassarmor.lightning_modules.run.processes import is_echo

_TURNING: Final = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the order of what is read
EVERY: Final = 15.0  # seconds from one line of progress to the next, where there is no terminal for a bar


def printable(text: str) -> str:
    """The text without what a terminal takes for commands: names come from data, and data from anywhere."""
    return "".join(c if c in "\n\t" or (category(c) not in ("Cc", "Cs") and c not in _TURNING) else "�" for c in text)


class _Terminal(Console):
    """What is printed is text alone: no markup, no emoji codes, no control sequences, wherever a name comes from."""

    def __init__(self) -> None:
        super().__init__(soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


console = _Terminal()


def note(words: str) -> None:
    """A line that is marked as a note."""
    console.print(Text.assemble(("note", "yellow"), f"  {printable(words)}"))


def now_and_then() -> Callable[[str], None]:
    """Prints what it is told, and nothing for ``EVERY`` seconds after that or after now."""
    last = monotonic()

    def tell(words: str) -> None:
        nonlocal last
        if monotonic() - last >= EVERY:
            last = monotonic()
            console.print(words)

    return tell


@contextmanager
def steps(title: str) -> Iterator[Callable[[str], None]]:
    """Says what is being done: beside a spinner in a terminal, in a line now and then elsewhere."""
    if not console.is_terminal:
        tell = now_and_then()
        yield lambda step: tell(f"{title}: {step}")
        return
    with console.status(title) as status:
        yield lambda step: status.update(f"{title}: {step}")


@contextmanager
def clear_errors(debug: bool, how: str = "debug=true") -> Iterator[None]:
    """While a run is put together: one line instead of a stack trace, and exit code 2.

    The wrapper that Hydra puts around an error in a constructor is taken off.  Of processes that start together on a
    machine one speaks.
    """
    try:
        yield
    except Exception as error:
        if debug:
            traceback.print_exc()
        root: BaseException = error
        while type(root).__module__.startswith("hydra") and root.__cause__ is not None:
            root = root.__cause__
        kind = "" if isinstance(root, (ValueError, OSError)) else f"{type(root).__name__}: "
        if not is_echo():
            print(f"error: {kind}{printable(' '.join(str(root).split()))}\n({how} shows the stack trace)", file=sys.stderr)
        sys.exit(2)


NOT_FINITE: Final = " (not finite)"  # behind the name of a network: its accuracies mean nothing
GUESSES: Final = " (guesses)"


def marked(network: str, finite: bool = True, guesses: bool = False) -> str:
    """The name of a network, with what makes its accuracies mean nothing."""
    return network + NOT_FINITE * (not finite) + GUESSES * guesses


def show(table: Table) -> None:
    """Print a table."""
    shown = RichTable(title=table.title)
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if i else "left", overflow="fold")  # names cut short look alike
    for row in table.rows:
        shown.add_row(*[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row])
    console.print(shown)
