"""``glassarmor train|evaluate|compare …``: what the scripts do, from any folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from glassarmor.lightning_modules.run.doors import enter

COMMANDS: Final = {
    "train": "train a robust classifier: compose the config, fit, test, report",
    "evaluate": "look into a trained network, or judge it by a suite of attacks",
    "export": "write a run's network as plain weights",
    "compare": "set runs or result cards beside each other, or train a study",
}
USAGE: Final = "\n".join(
    ["usage: glassarmor COMMAND …", *(f"  {name:<9} {what}" for name, what in COMMANDS.items()), "COMMAND --help says more"]
)


def main() -> None:
    """The console command.  Words after the first are those of the script of that name."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        asked = command in ("", "-h", "--help")
        print(USAGE if asked else f"error: expected one of {', '.join(COMMANDS)}; found {command!r}\n{USAGE}")
        sys.exit(0 if asked else 2)
    enter()
    _runner(command)()


def _runner(command: str) -> Callable[[], None]:
    """Imported when asked for: a usage message needs no torch."""
    if command == "train":
        from glassarmor.lightning_modules.commands.train import run
    elif command == "export":
        from glassarmor.lightning_modules.commands.loading import run
    elif command == "evaluate":
        from glassarmor.lightning_modules.commands.evaluate import run
    else:
        from glassarmor.lightning_modules.commands.study import run
    return run
