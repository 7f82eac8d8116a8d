"""The fast suite against standard AutoAttack on identical images: robust accuracy, per-example agreement, time.

    python benchmarks/suites.py RUN [RUN ...] [--images 500] [--batch 250] [--out FOLDER]

RUN is a run folder (its best checkpoint) or a checkpoint in one.  Images: the test split, the classes in their shares.  Both
suites attack the same images one after the other in this process; the shares are fast / standard, of the seconds and of the
forwards and backwards, which no other job on the machine disturbs.  With --out each suite keeps its state there and goes on
where it was stopped (times add up).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.defenses.evaluation.robustness import Evaluation, evaluate_robustness
from glassarmor.defenses.evaluation.sampling import stratified_rows
from glassarmor.lightning_modules.commands.subject import located
from glassarmor.lightning_modules.networks.build import load_weights, make_network


def judged(run: str, count: int, batch: int, out: Path | None) -> dict[str, Evaluation]:
    weights, config = located(run)
    if config is None:
        raise SystemExit(f"{run} lies in no run folder")
    cfg = OmegaConf.load(config)
    data = instantiate(cfg.data, _convert_="all")
    data.setup("fit")
    net = make_network(instantiate(cfg.network), data, bool(cfg.get("channels_last")))
    load_weights(net, weights)
    rows = stratified_rows(data.test.labels, min(count, len(data.test)))
    images, labels = data.test.images[rows].float() / 255, data.test.labels[rows]
    threat = instantiate(cfg.threat)
    found = {}
    for suite in ("fast", "standard"):
        state = None if out is None else out / f"{config.parent.name}-{suite}.json"
        found[suite] = evaluate_robustness(
            net, images, labels, threat, suite, subset=len(labels), batch_size=batch, state=state
        )
        by = ", ".join(f"{a.name} {100 * a.accuracy:.2f} ({a.seconds:.0f} s)" for a in found[suite].attacks)
        print(f"{config.parent.name}, {threat}, {suite}: {by}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    print(
        "| net | n | clean | fast | standard | difference | same verdict | time, fast | time, standard | share | of passes |"
    )
    print("|---" * 11 + "|", flush=True)
    for run in args.runs:
        found = judged(run, args.images, args.batch, args.out)
        fast, standard = found["fast"], found["standard"]
        same = (fast.standing == standard.standing).double().mean()
        accuracies = [100 * value for value in (fast.clean_accuracy, fast.accuracy, standard.accuracy)]
        cells = [f"{value:.2f} %" for value in accuracies] + [f"{accuracies[1] - accuracies[2]:+.2f}", f"{100 * same:.1f} %"]
        times = f"{fast.seconds:.0f} s | {standard.seconds:.0f} s | {100 * fast.seconds / standard.seconds:.1f} %"
        passes = (fast.forwards + fast.backwards) / (standard.forwards + standard.backwards)
        times += f" | {100 * passes:.1f} %"
        name = "/".join(Path(run).parts[-3:]) if Path(run).is_file() else Path(run).name
        print(f"| {name} | {fast.n} | {' | '.join(cells)} | {times} |", flush=True)


if __name__ == "__main__":
    main()
