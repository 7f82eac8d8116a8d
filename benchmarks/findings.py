"""Tables of docs/findings.md from the analyses that evaluate.py wrote: what each attack does to each network.

python evaluate.py checkpoint=runs/NAME attack=pgd        # and so on, for every network and attack
python benchmarks/findings.py analyses/*                  # a row each, in this order
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Analysis = dict[str, Any]


def number(value: float | None, digits: int = 2, percent: bool = False) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if percent else f"{value:.{digits}f}"


def show(title: str, columns: dict[str, Callable[[Analysis], str]], analyses: dict[str, Analysis]) -> None:
    print(f"\n### {title}\n\n| analysis | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, analysis in analyses.items():
        print(f"| {name} | " + " | ".join(cell(analysis) for cell in columns.values()) + " |")


def scalar(key: str, digits: int = 2, percent: bool = False) -> Callable[[Analysis], str]:
    return lambda analysis: number(analysis["scalars"].get(key), digits, percent)


def over_active(kind: str) -> Callable[[Analysis], str]:
    """Share of a kind among the regions where the attack does anything."""

    def cell(analysis: Analysis) -> str:
        active = 1 - analysis["scalars"]["pse/share_inactive"]
        return number(analysis["scalars"][f"pse/share_{kind}"] / active if active > 0 else None, percent=True)

    return cell


def overlap(kind: str, label: str) -> Callable[[Analysis], str]:
    """Mean CAM percentile of the regions of a kind, with its p-value."""

    def cell(analysis: Analysis) -> str:
        for chart in analysis["panels"]["cam"]["charts"]:
            if chart["type"] == "table" and chart["title"].startswith("Where the kinds"):
                for row in chart["rows"]:
                    if row[0] == kind and row[1] == label:
                        return f"{number(row[3])} (p {number(row[5], 3)})" if row[2] else "–"
        return "–"

    return cell


def by_layer(what: Callable[[dict[str, float], str], float | None], digits: int) -> Callable[[Analysis], str]:
    """One number a layer, input to output."""

    def cell(analysis: Analysis) -> str:
        scalars = analysis["scalars"]
        layers = [key.removeprefix("units/gap/") for key in scalars if key.startswith("units/gap/")]
        return " · ".join(number(what(scalars, layer), digits) for layer in layers)

    return cell


def ratio(scalars: dict[str, float], layer: str) -> float | None:
    noise = scalars.get(f"sensitivity/noise/{layer}")
    return scalars[f"sensitivity/attack/{layer}"] / noise if noise else None


TABLES: dict[str, dict[str, Callable[[Analysis], str]]] = {
    "What the attack achieves, and how (kinds: share of the active regions)": {
        "clean": scalar("outcome/clean_acc", percent=True),
        "attacked": scalar("outcome/robust_acc", percent=True),
        "success": scalar("outcome/success", percent=True),
        "median L2": scalar("outcome/l2", 3),
        "median L∞": scalar("outcome/linf", 3),
        "pixels": scalar("outcome/pixels", percent=True),
        "suppression": over_active("suppression"),
        "promotion": over_active("promotion"),
        "balanced": over_active("balanced"),
        "inactive": scalar("pse/share_inactive", percent=True),
        "Σ s (logits)": scalar("pse/suppression"),
        "Σ p (logits)": scalar("pse/promotion"),
        "gap": scalar("pse/gap"),
    },
    "Class-discriminative regions: interpretability score of C(x, t0) and CAM percentile by kind (½ is chance)": {
        "score": scalar("cam/interpretability"),
        "even δ": scalar("cam/interpretability_chance"),
        "shuffled": scalar("cam/interpretability_shuffled"),
        "other image": scalar("cam/interpretability_swapped"),
        "score of C(x', t)": scalar("cam/interpretability_target"),
        "suppression in C(x, t0)": overlap("suppression", "true class, clean"),
        "promotion in C(x', t)": overlap("promotion", "target, adversarial"),
        "balanced in C(x, t0)": overlap("balanced", "true class, clean"),
    },
    "Restoration: area under the curve": {
        "by effect": scalar("restoration/effect"),
        "by ‖δ‖": scalar("restoration/norm"),
        "by chance": scalar("restoration/chance"),
    },
    "Units, layer by layer from input to output": {
        "attack / noise": by_layer(ratio, 1),
        "attack-sensitive share": by_layer(lambda s, layer: s.get(f"sensitivity/attack_sensitive/{layer}"), 2),
        "mean sensitivity (σ)": by_layer(lambda s, layer: s.get(f"units/sensitivity/{layer}"), 2),
        "completeness gap": by_layer(lambda s, layer: s.get(f"units/gap/{layer}"), 4),
        "CAM change, true": scalar("cam/change_true"),
        "CAM similarity": scalar("cam/similarity_true"),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args()
    analyses = {}
    for folder in args.folders:
        file = folder / "analysis.json"
        if not file.is_file():
            parser.error(f"{folder} holds no analysis.json")
        analyses[folder.name] = json.loads(file.read_text(encoding="utf-8"))
    for title, columns in TABLES.items():
        show(title, columns, analyses)


if __name__ == "__main__":
    main()
