"""What was changed of a run while it was trained.

``config.yaml`` says what the run goes on with; ``changed`` in it, the last entry, says which keys once said something else,
and at which step and epoch they were changed.  A run that was never changed has no such entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

CHANGED: Final = "changed"


def changes(config: Mapping[str, Any]) -> list[str]:
    """A sentence a change, the oldest first."""
    return [
        f"{entry['key']} from {json.dumps(entry['from'])} to {json.dumps(entry['to'])} at step {entry['step']} "
        f"(epoch {entry['epoch']})"
        for entry in config.get(CHANGED) or ()
    ]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of all leaves."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) and inner else {f"{prefix}{key}": inner}
    return found
