"""The tables of docs/findings.md, from a folder of analyses NETWORK-ATTACK that evaluate.py wrote (see findings.sh).

python benchmarks/findings.py analyses
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Analysis = dict[str, Any]
NETWORKS = {
    "digits_none": "digits, undefended",
    "digits_trades": "digits, TRADES",
    "cifar_none": "CIFAR-10, undefended",
    "cifar_pgd": "CIFAR-10, PGD-AT",
}
ATTACKS = {"pgd": "PGD-20", "fgsm": "FGSM", "cw": "C&W", "ead": "EAD", "group_sparse": "group-sparse"}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def layers(scalars: dict[str, float]) -> list[str]:
    return [key.removeprefix("units/gap/") for key in scalars if key.startswith("units/gap/")]


def place(analysis: Analysis, kind: str, label: str) -> str:
    """Mean CAM percentile of the regions of a kind; "n.s." where its permutation p-value is 0.05 or more."""
    for chart in analysis["panels"]["cam"]["charts"]:
        if chart["type"] == "table" and chart["title"].startswith("Where the kinds"):
            for row in chart["rows"]:
                if row[:2] == [kind, label] and row[2]:
                    return number(row[3]) + ("" if row[5] < 0.05 else " n.s.")
    return "–"


def kinds(a: Analysis) -> list[str]:
    s = a["scalars"]
    active = 1 - s["pse/share_inactive"]
    return [
        f"{percent(s['outcome/clean_acc'])} → {percent(s['outcome/robust_acc'])}",
        percent(s["outcome/pixels"]),
        *(percent(s[f"pse/share_{kind}"] / active if active else None) for kind in ("suppression", "promotion", "balanced")),
        percent(s["pse/share_inactive"]),
        number(s["pse/gap"] / (s["pse/suppression"] + s["pse/promotion"])),
    ]


def regions(a: Analysis) -> list[str]:
    s = a["scalars"]
    return [
        *(number(s[f"cam/interpretability{suffix}"]) for suffix in ("", "_shuffled", "_swapped", "_target")),
        place(a, "suppression", "true class, clean"),
        place(a, "promotion", "target, adversarial"),
    ]


def units(a: Analysis) -> list[str]:
    s = a["scalars"]
    ratios = (s[f"sensitivity/attack/{layer}"] / s[f"sensitivity/noise/{layer}"] for layer in layers(s))
    return [
        *(number(s[f"restoration/{order}"]) for order in ("effect", "norm", "chance")),
        " · ".join(number(ratio, 1) for ratio in ratios),
        number(100 * max(s[f"units/gap/{layer}"] for layer in layers(s))),
    ]


def supported(a: Analysis) -> str:
    s = a["scalars"]
    return f"{percent(s['outcome/success'])}, {percent(s['outcome/pixels'])} ({number(s['outcome/l2'])})"


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    columns = list(columns)
    print(f"\n**{title}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/analysis.json")}

    def by_attack(measure: Callable[[Analysis], list[str]], attacks: Iterable[str]) -> list[list[str]]:
        return [
            [name, ATTACKS[attack], *measure(found[f"{key}-{attack}"])]
            for key, name in NETWORKS.items()
            for attack in attacks
            if f"{key}-{attack}" in found
        ]

    show(
        "How the attack wins: kinds of regions, as shares of the active ones; % except the interaction gap",
        [
            "network",
            "attack",
            "clean → attacked",
            "pixels",
            "suppression",
            "promotion",
            "balanced",
            "inactive",
            "gap / (Σp + Σs)",
        ],
        by_attack(kinds, ATTACKS),
    )
    show(
        "Class-discriminative regions: interpretability scores, and CAM percentile of the kinds (½ is chance)",
        [
            "network",
            "attack",
            "C(x, t0)",
            "shuffled",
            "other image",
            "C(x′, t)",
            "suppression in C(x, t0)",
            "promotion in C(x′, t)",
        ],
        by_attack(regions, ATTACKS),
    )
    show(
        "CAM support: success %, pixels changed % (median L2)",
        ["network", "attack", "CAM support", "the same, shifted", "random pixels", "whole image"],
        [
            [name, title, *(supported(found[key]) if (key := f"{net}-{kind}") in found else "–" for kind in kinds_of)]
            for net, name in NETWORKS.items()
            for title, kinds_of in (
                ("PGD-20", ("cam_pgd", "shifted_pgd", "random_pgd", "pgd")),
                ("C&W", ("cam_cw", "shifted_cw", "", "cw")),
            )
        ],
    )
    show(
        "Faithfulness: restoration areas; sensitivity over noise of equal norm by layer; completeness gap, worst layer, %",
        ["network", "attack", "area by effect", "by ‖δ‖", "by chance", "attack / noise by layer", "gap"],
        by_attack(units, ("pgd", "ead")),
    )


if __name__ == "__main__":
    main()
