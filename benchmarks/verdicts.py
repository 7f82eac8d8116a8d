"""Are honest nets of many families let pass, and planted defenses called out?  Verdicts of the sanity checks, as a page.

    python benchmarks/verdicts.py [--state FOLDER] [--write docs/verdicts.md] [--every]

Honest: each family of ``tests/honest.py`` after seconds of training, on two of the five kinds of images, or on all.
Planted: each false defense of ``tests/planted.py`` on a convolutional net of four kinds of images.  One JSON a net goes to
FOLDER, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.defenses import Linf
from glassarmor.defenses.evaluation.sanity import sanity_checks
from tests.honest import EPS, FAMILIES, IMAGES, trained
from tests.planted import CUTS, DEFENSES, Cut

COUNT: Final = 64
BASE: Final = "conv, BN, ReLU, max-pool"
PLANTED: Final[dict[str, Callable[[nn.Module], nn.Module]]] = DEFENSES | {
    f"gradient cut by {how}": lambda net, how=how: Cut(net, how) for how in CUTS
}

Row = dict[str, Any]


def judged(net: nn.Module, images: str) -> Row:
    """The verdict on one net, by images that it was not trained on."""
    x, y = IMAGES[images](COUNT, 7)
    try:
        report = sanity_checks(net, x, y, Linf(EPS), queries=100)
    except ValueError as error:
        return {"verdict": "refused", "failed": [str(error)], "clean": None, "stands": None}
    failed = [check.name for check in report.checks if not check.passed]
    accuracy = report.accuracy
    return {
        "verdict": report.verdict,
        "failed": failed,
        "clean": accuracy["clean"],
        "stands": min(accuracy.values()) if len(accuracy) > 1 else None,
    }


def kept(name: str, state: Path | None, make: Callable[[], Row]) -> Row:
    """What an earlier run found, or what ``make`` finds now."""
    path = None if state is None else state / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.json"
    if path is not None and path.exists():
        found: Row = json.loads(path.read_text())
        return found
    found = make()
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return found


def honest(every: bool, state: Path | None) -> Iterator[tuple[str, str, Row]]:
    kinds = [*IMAGES]
    for place, family in enumerate(FAMILIES):
        for images in kinds if every else (kinds[place % 5], kinds[(place + 2) % 5]):
            row = kept(f"honest {family} {images}", state, lambda f=family, i=images: judged(trained(f, i), i))
            yield family, images, row


def planted(state: Path | None) -> Iterator[tuple[str, str, Row]]:
    net = cache(lambda images: trained(BASE, images))
    for images in ("natural", "black", "letterboxed", "cartoon"):
        for name, make in PLANTED.items():
            row = kept(f"planted {name} {images}", state, lambda m=make, i=images: judged(m(net(i)).eval(), i))
            yield name, images, row


def page(every: bool, state: Path | None) -> str:
    nothing, something = list(honest(every, state)), list(planted(state))
    counts = [Counter(row["verdict"] for _, _, row in rows) for rows in (nothing, something)]
    verdicts = ("trusted", "suspicious", "invalid", "refused")
    told = [", ".join(f"{count[verdict]} {verdict}" for verdict in verdicts if count[verdict]) for count in counts]
    command = f"python benchmarks/verdicts.py{' --every' if every else ''} --write docs/verdicts.md"
    lines = [
        "# Verdicts on honest nets and on planted defenses",
        "",
        f"Written by `{command}`: the sanity checks",
        f"alone (no suite), L∞ ε = {EPS}, {COUNT} held-out images of 16×16.  Honest nets are trained for seconds on",
        "one-step attacks; black, white, letterboxed and cartoon images have flat areas.  Planted are defenses that hide",
        "their gradients or distort their outputs.",
        "",
        f"- {len(nothing)} honest nets of {len(FAMILIES)} families: {told[0]}.",
        f"- {len(something)} planted: {told[1]}.",
        "",
        "| honest family | images | verdict | clean | stands after all checks | checks that failed |",
        "|---|---|---|---|---|---|",
        *(_line(*each) for each in nothing),
        "",
        "| planted | images | verdict | clean | stands after all checks | checks that failed |",
        "|---|---|---|---|---|---|",
        *(_line(*each) for each in something),
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, images: str, row: Row) -> str:
    shares = ["–" if row[key] is None else f"{100 * row[key]:.0f} %" for key in ("clean", "stands")]
    return f"| {' | '.join([name, images, row['verdict'], *shares, ', '.join(row['failed']) or '–'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--every", action="store_true", help="honest nets on all five kinds of images")
    args = parser.parse_args()
    text = page(args.every, args.state)
    if args.write is not None:
        args.write.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
