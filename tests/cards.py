"""Result cards made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glassarmor.defenses.evaluation.sampling import wilson

CHECK = {"name": "losses agree", "passed": True, "figure": 0.0, "expected": "few", "sentence": "they do", "grave": False}


def suite_card(standing: Sequence[bool]) -> dict[str, Any]:
    """Of images of one class, all rightly classified, of which these withstand the only attack."""
    n, robust = len(standing), sum(standing) / len(standing)
    attack = {"name": "PGD-20", "attacked": n, "felled": n - sum(standing), "accuracy": robust, "settings": {}}
    passes = {"forwards": 20 * n, "backwards": 20 * n, "seconds": 1.5}
    return {
        "schema": "glassarmor-card/1",
        "model": {"name": "net", "source": "by hand", "parameters": 1, "weights": "0" * 16},
        "data": {"name": "Noise", "split": "test", "selection": "nothing", "n": n, "images": "0" * 16},
        "threat": {"norm": "Linf", "eps": 0.1},
        "suite": {"name": "probe", "settings": "0" * 16, "attacks": [attack | passes], **passes},
        "accuracy": {
            "clean": 1.0,
            "robust": robust,
            "interval95": list(wilson(sum(standing), n)),
            "by_class": [{"class": "a", "n": n, "clean": 1.0, "robust": robust}],
            "by_eps": [{"eps": 0.0, "robust": 1.0}, {"eps": 0.1, "robust": robust}],
            "by_corruption": {},
        },
        "sanity": {"verdict": "trusted", "reasons": [], "images": n, "checks": [CHECK]},
        "interpretation": {},
        "examples": {
            "rows": [*range(n)],
            "labels": [0] * n,
            "correct": [True] * n,
            "standing": [*standing],
            "felled_by": [None if stands else "PGD-20" for stands in standing],
        },
        "seed": 0,
        "versions": {},
        "commit": "abc",
        "notes": [],
        "config": {},
    }
