"""Are planted defenses called out, and honest networks let pass?  The verdicts as a Markdown table.

    python benchmarks/sanity.py --out FOLDER [--seeds 0 1 2] [--images 128] [--honest] [--checkpoints RUN/checkpoints/X.ckpt]

Trains small CNNs on the embedded digits for each seed, undefended and with PGD-5; takes the networks of other runs as they
are; plants every defense of ``tests/planted.py`` on each.  Images of the test split.  ``--honest`` plants nothing.
One JSON a network and defense, one state dict a trained network go to FOLDER, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.datamodules.digits import Digits
from glassarmor.defenses import PGD, AdversarialCE, CleanCE, Defense, Linf, Threat
from glassarmor.defenses.evaluation.sanity import sanity_checks
from glassarmor.lightning_modules.networks.build import load_weights, make_network
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from tests.planted import DEFENSES

EPS = 0.06  # budget.linf of the digits
HONEST = "nothing planted"
TRAINED = ("undefended", "PGD-AT")
Case = tuple[nn.Module, Tensor, Tensor, Threat]


def digits_net(kind: str, seed: int, folder: Path, epochs: int = 15) -> Case:
    """A small CNN after a plain training loop, or what an earlier call left of it."""
    data = Digits(batch_size=128)
    data.setup("fit")
    net = SmallCNN(num_classes=10, in_channels=1, mean=data.mean, std=data.std, width=0.5)
    path = folder / f"digits-{kind}-{seed}.pt"
    if not path.exists():
        torch.manual_seed(seed)
        net = SmallCNN(num_classes=10, in_channels=1, mean=data.mean, std=data.std, width=0.5)
        attacked = Defense(PGD(Linf(EPS), steps=5, seed=seed), {"ce": AdversarialCE()})
        defense = attacked if kind == "PGD-AT" else Defense(None, {"ce": CleanCE()})
        x, y = data.train.images.float() / 255, data.train.labels
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=-(-len(x) // 128) * epochs)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(128):
                loss = defense(net.train(), x[rows], y[rows]).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval(), data.test.images.float() / 255, data.test.labels, Linf(EPS)


def of_run(checkpoint: Path) -> Case:
    """The network of a run's checkpoint, its test images and its threat."""
    cfg = OmegaConf.load(checkpoint.parent.parent / "config.yaml")
    data = instantiate(cfg.data, _convert_="all")
    data.setup("fit")
    net = make_network(instantiate(cfg.network), data)
    load_weights(net, checkpoint)
    return net.eval(), data.test.images.float() / 255, data.test.labels, instantiate(cfg.threat)


def judge(name: str, case: Case, planted: list[str], images: int, folder: Path) -> None:
    """One JSON for each of the planted defenses that has none yet."""
    net, x, y, threat = case
    for defense in planted:
        path = folder / f"{re.sub('[^A-Za-z0-9]+', '-', f'{name} {defense}')}.json"
        if path.exists():
            continue
        begin = time.perf_counter()
        target = net if defense == HONEST else DEFENSES[defense](net).eval()
        report = sanity_checks(target, x[:images], y[:images], threat)
        row = {
            "net": name,
            "planted": defense,
            "images": report.images,
            "verdict": report.verdict,
            "seconds": time.perf_counter() - begin,
            "accuracy": report.accuracy,
            "checks": [asdict(check) for check in report.checks],
        }
        path.write_text(json.dumps(row, indent=1))
        print(
            f"{name}, {defense}: {report.verdict} ({row['seconds']:.0f} s)  {report.accuracy}", file=sys.stderr, flush=True
        )


def table(folder: Path, names: list[str], planted: list[str]) -> str:
    """Verdicts and what called them, by what was planted; then the figures of the honest networks."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = [row for row in rows if row["net"] in names]
    lines = ["| planted | networks | trusted | suspicious | invalid | called by (networks) |", "|---|---|---|---|---|---|"]
    for defense in planted:
        mine = [row for row in rows if row["planted"] == defense]
        verdicts = Counter(row["verdict"] for row in mine)
        failed = Counter(check["name"] for row in mine for check in row["checks"] if not check["passed"])
        called = ", ".join(f"{name} ({count})" for name, count in failed.most_common()) or "–"
        counts = " | ".join(str(verdicts[verdict]) for verdict in ("trusted", "suspicious", "invalid"))
        lines.append(f"| {defense} | {len(mine)} | {counts} | {called} |")
    honest = [row for row in rows if row["planted"] == HONEST]
    checks = {check["name"]: None for row in honest for check in row["checks"]}
    lines += ["", f"| nothing planted | {' | '.join(row['net'] for row in honest)} |", "|---" * (len(honest) + 1) + "|"]
    for key in ("clean", "PGD-20", "with noise and Square"):
        cells = [f"{100 * row['accuracy'][key]:.1f} %" if key in row["accuracy"] else "–" for row in honest]
        lines.append(f"| accuracy: {key} | {' | '.join(cells)} |")
    for name in checks:
        cells = ["–"] * len(honest)
        for i, row in enumerate(honest):
            for check in row["checks"]:
                if check["name"] == name:
                    cells[i] = f"{check['figure']:.3g}{'' if check['passed'] else ' failed'}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seconds = [f"{row['seconds']:.0f}" for row in honest]
    lines.append(f"| seconds | {' | '.join(seconds)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--honest", action="store_true", help="plant nothing")
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[], help="of runs, beside the digits")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    planted = [HONEST] if args.honest else [HONEST, *DEFENSES]
    names = []
    for seed in args.seeds:
        for kind in TRAINED:
            names.append(f"digits, {kind}, seed {seed}")
            judge(names[-1], digits_net(kind, seed, args.out), planted, args.images, args.out)
    for checkpoint in args.checkpoints:
        names.append(checkpoint.resolve().parent.parent.name)
        judge(names[-1], of_run(checkpoint), planted, args.images, args.out)
    print(table(args.out, names, planted))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
