"""Which interpretation-guided defense helps, and what does masking cost?  One Markdown table on the embedded digits.

    python benchmarks/defense_table.py --out FOLDER [--seeds 0 1 2] [--epochs 14] [--width 0.5] [--quick]

Rows: the undefended net, PGD-AT and TRADES bare and with each regulariser, and masked nets made from the undefended and from
the PGD-AT net.  Units are chosen on the validation split, accuracies are those of the test split, through the mask; masked
units answer their clean mean.  Tuning goes on with the net's own training; so does a control without mask.
Columns: clean, PGD-20, and "knows it": image by image the worst of PGD-20 and of AdaptivePGD-20 at each of the attack
weights, which knows the row's regulariser with all its estimates; rows without one get as many more starts of PGD instead.

One JSON a row and seed goes to FOLDER, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.datamodules.concepts import procedural_concepts
from glassarmor.datamodules.images import Images
from glassarmor.defenses import PGD, AdaptivePGD, Term, Threat, UnitMask, choose_units, fine_tune, masked
from glassarmor.defenses.masking import Criterion
from glassarmor.interpret.concepts.association import Mode, concept_weights
from glassarmor.interpret.concepts.dissection import dissect
from glassarmor.lightning_modules.commands.train import CONFIGS, Parts, build

BASES = {  # many short steps: on so few images they train more for the time than few strong ones
    "undefended": ["defense=none"],
    "PGD-AT": ["defense=pgd_at", "defense.attack.steps=5"],
    "TRADES": ["defense=trades", "defense.attack.steps=5"],
}
CONCEPTS = "{_target_:glassarmor.datamodules.procedural_concepts,_partial_:true,count:200}"
REGULARIZERS = {
    "pse units": ("pse", "pse.over=units"),
    "pse positions": ("pse", "pse.over=positions"),
    "pse both": ("pse", "pse.over=both"),
    "sensitivity all": ("sensitivity", "sensitivity.at=all"),
    "sensitivity turning": ("sensitivity", "sensitivity.at=turning"),
    "sensitivity of detectors": ("sensitivity", f"sensitivity.concepts={CONCEPTS}", "sensitivity.mode=stabilise_detectors"),
    "sensitivity of non-detectors": (
        "sensitivity",
        f"sensitivity.concepts={CONCEPTS}",
        "sensitivity.mode=suppress_non_detectors",
    ),
    "CAM discrepancy": ("cam_discrepancy", "cam_discrepancy.scale=none"),
    "CAM discrepancy, share": ("cam_discrepancy", "cam_discrepancy.scale=share", "cam_discrepancy.weight=0.5"),
}
CRITERIA: dict[str, tuple[Criterion, Mode | None]] = {  # what scores the units, and whom the concepts favour
    "sensitivity": ("sensitivity", None),
    "margin": ("margin", None),
    "noise_corrected": ("noise_corrected", None),
    "noise_corrected, detectors kept": ("noise_corrected", "protect_detectors"),
    "noise_corrected, non-detectors first": ("noise_corrected", "suppress_non_detectors"),
    "random": ("random", None),
}
SHARES = (0.1, 0.25)
LAYERS = ("stage2", "stage3")
MASKED = ("undefended", "PGD-AT")  # the nets that are masked
COLUMNS = ("clean", "PGD-20", "knows it")


def trained_rows() -> dict[str, list[str]]:
    """Overrides of the training config by row."""
    rows = {name: [*defense, "regularizers=[]"] for name, defense in BASES.items()}
    for (base, defense), (name, (group, *options)) in itertools.product(BASES.items(), REGULARIZERS.items()):
        if base != "undefended":
            chosen = [f"regularizers=[{group}]", *(f"regularizers.{option}" for option in options)]
            rows[f"{base} + {name}"] = [*defense, *chosen]
    return rows


def masked_rows(base: str) -> dict[str, tuple[str, float, str, bool]]:
    """Criterion, share, layer and fine-tuning by row; first the control that is tuned as long without a mask."""
    return {f"{base}, tuned": ("", 0.0, "", True)} | {
        f"{base}, {share:.0%} of {layer} by {by}{', tuned' if tuned else ''}": (by, share, layer, tuned)
        for layer, share, by, tuned in itertools.product(LAYERS, SHARES, CRITERIA, (False, True))
    }


@dataclass(frozen=True)
class Settings:
    """What all rows share; part of the results, so that two kinds never mix."""

    sizes: tuple[str, ...]
    steps: int
    tune_epochs: int
    attack_weights: tuple[float, ...]

    def config(self, overrides: list[str], seed: int) -> DictConfig:
        fixed = ["panels=[]", "trainer.accelerator=cpu", f"seed={seed}"]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose("train", [*overrides, *self.sizes, *fixed])

    def judge(self, net: nn.Module, part: Images, threat: Threat, terms: Mapping[str, Term]) -> dict[str, float]:
        """Accuracy by column."""
        x, y = as_tensors(part)

        def right(images: Tensor) -> Tensor:
            with torch.no_grad():
                return net.eval()(images).argmax(1) == y

        clean, plain = right(x), right(PGD(threat, steps=self.steps, seed=3)(net, x, y))
        worst = plain.clone()
        for i, weight in enumerate(self.attack_weights):
            worst &= right(AdaptivePGD(threat, terms, weight, steps=self.steps, seed=4 + i)(net, x, y))
        return {name: found.double().mean().item() for name, found in zip(COLUMNS, (clean, plain, worst), strict=True)}


def as_tensors(part: Images) -> tuple[Tensor, Tensor]:
    return part.images.float() / 255, part.labels


def fitted(cfg: DictConfig) -> Parts:
    parts = build(cfg)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    instantiate(cfg.trainer, **options).fit(parts.module, datamodule=parts.data)
    return parts


class Results:
    """One JSON a row and seed, one state dict a base net and seed."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        known, ours = folder / "settings.json", json.dumps(asdict(settings))
        if known.exists() and known.read_text() != ours:
            raise SystemExit(f"--out: {folder} holds results of other settings, {known.read_text()}; name another folder")
        known.write_text(ours)

    def path(self, row: str, seed: int, suffix: str = "json") -> Path:
        return self.folder / f"{re.sub('[^A-Za-z0-9.]+', '-', row)}-s{seed}.{suffix}"

    def add(self, row: str, seed: int, found: Mapping[str, float], begin: float) -> None:
        seconds = time.perf_counter() - begin
        self.path(row, seed).write_text(json.dumps({"row": row, "seed": seed, "seconds": seconds, **found}))
        shown = "  ".join(f"{name} {100 * found[name]:.1f}" for name in COLUMNS)
        print(f"{row}, seed {seed}: {shown}  ({seconds:.0f} s)", file=sys.stderr, flush=True)

    def table(self, rows: list[str], seeds: list[int]) -> str:
        lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for row in rows:
            found = [json.loads(self.path(row, seed).read_text()) for seed in seeds]
            cells = []
            for column in COLUMNS:
                values = 100 * torch.tensor([one[column] for one in found], dtype=torch.float64)
                spread = f" ± {values.std().item():.1f}" if len(seeds) > 1 else ""
                cells.append(f"{values.mean().item():.1f}{spread}")
            lines.append(f"| {row} | {' | '.join(cells)} |")
        return "\n".join(lines)


def train_row(row: str, overrides: list[str], seed: int, settings: Settings, results: Results) -> None:
    begin = time.perf_counter()
    cfg = settings.config(overrides, seed)
    parts = fitted(cfg)
    defense, net = parts.module.defense, parts.module.net
    if row in MASKED:
        torch.save(net.state_dict(), results.path(row, seed, "pt"))
    terms = {name: term for name, term in defense.named_terms().items() if name in defense.regularizer_names}
    results.add(row, seed, settings.judge(net, parts.data.test, instantiate(cfg.threat), terms), begin)


def chosen_mask(
    net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, layer: str, share: float, criterion: str, seed: int
) -> UnitMask:
    by, mode = CRITERIA[criterion]
    weights = None
    if mode is not None:
        data = procedural_concepts(count=500, size=x.shape[-1], channels=x.shape[1])
        weights = {layer: concept_weights(dissect(net, data, [layer], quantile=0.02)[layer], mode)}
    return choose_units(net, x, x_adv, y, [layer], share, by, fill="mean", weights=weights, seed=seed)


def mask_rows(base: str, rows: list[str], seed: int, settings: Settings, results: Results) -> None:
    cfg = settings.config(trained_rows()[base], seed)
    weights = results.path(base, seed, "pt")
    if not weights.exists():
        torch.save(fitted(cfg).module.net.state_dict(), weights)
    parts = build(cfg)  # anew in any case, so that a run that was stopped tunes on the same batches
    parts.module.net.load_state_dict(torch.load(weights, weights_only=True))
    net, threat = parts.module.net.eval(), instantiate(cfg.threat)
    x, y = as_tensors(parts.data.val)
    x_adv = PGD(threat, steps=settings.steps, seed=1)(net, x, y)
    for row in rows:
        begin = time.perf_counter()
        by, share, layer, tuned = masked_rows(base)[row]
        mask = chosen_mask(net, x, x_adv, y, layer, share, by, seed) if by else UnitMask({}, {})
        twin = masked(net, mask)
        if tuned:
            defense = instantiate(cfg.defense, _convert_="all")
            fine_tune(twin, parts.data.train_dataloader(), defense, epochs=settings.tune_epochs, lr=0.02)
        results.add(row, seed, settings.judge(twin, parts.data.test, threat, {}), begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--tune-epochs", type=int, default=2)
    parser.add_argument("--attack-weights", type=float, nargs="+", default=[1.0, -1.0])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--quick", action="store_true", help="one seed, few images, one epoch: to see that it runs")
    args = parser.parse_args()
    sizes: tuple[str, ...] = (f"network.width={args.width}", f"trainer.max_epochs={args.epochs}", "data.batch_size=64")
    settings, seeds = Settings(sizes, 20, args.tune_epochs, tuple(args.attack_weights)), args.seeds
    if args.quick:
        sizes = ("network.width=0.25", "trainer.max_epochs=1", "data.train_limit=320", "data.test_limit=60")
        settings, seeds = Settings(sizes, 3, 1, tuple(args.attack_weights)), args.seeds[:1]
    results = Results(args.out, settings)
    trained = {row: overrides for row, overrides in trained_rows().items() if args.only in row}
    masks = {base: [row for row in masked_rows(base) if args.only in row] for base in MASKED}
    for seed in seeds:
        for row, overrides in trained.items():
            if not results.path(row, seed).exists():
                train_row(row, overrides, seed, settings, results)
        for base, rows in masks.items():
            todo = [row for row in rows if not results.path(row, seed).exists()]
            if todo:
                mask_rows(base, todo, seed, settings, results)
    print(results.table([*trained, *(row for rows in masks.values() for row in rows)], seeds))


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    torch.set_num_threads(1)
    main()
