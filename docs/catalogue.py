"""Writes docs/methods.md from the configs, the docstrings of what they name, and counted forwards: python docs/catalogue.py"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.errors import InstantiationException  # noqa: E402
from hydra.utils import get_class, instantiate  # noqa: E402
from omegaconf import DictConfig, ListConfig, OmegaConf  # noqa: E402
from torch import nn  # noqa: E402

from glassarmor.lightning_modules.networks.peers import CASGate  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
LIVE = 1000.0  # an epoch at which every ramp has arrived


def config(word: str) -> DictConfig:
    """The training config with this defense and no regulariser."""
    cfg = compose("train", ["regularizers=[]", "panels=[]", f"defense={word}"])
    OmegaConf.set_struct(cfg, False)
    return OmegaConf.masked_copy(cfg, ["defense", "threat", "budget", "seed", "awp", "regularizers"])


def changed(cfg: DictConfig, **values: Any) -> DictConfig:
    """A copy with other values; ``__`` stands for a dot."""
    twin = cfg.copy()
    for key, value in values.items():
        OmegaConf.update(twin, key.replace("__", "."), value)
    return twin


def regularizer(word: str) -> DictConfig | ListConfig:
    return OmegaConf.load(ROOT / "configs" / "regularizers" / f"{word}.yaml")


def words(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / group).glob("[!_]*.yaml"))


def comment(group: str, word: str, line: int) -> str:
    text = (ROOT / "configs" / group / f"{word}.yaml").read_text(encoding="utf-8").splitlines()[line]
    return text.removeprefix("# ").replace("|", "\\|")


def source(group: str, word: str) -> str:
    """The first comment of a YAML: where the method comes from, and what it is."""
    return comment(group, word, 0)


def summary(target: str) -> str:
    """First paragraph of a class's docstring, in one line, fit for a table."""
    text = inspect.getdoc(get_class(target)) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def weight(term: Mapping[str, Any]) -> str:
    value = term.get("weight", 1.0)
    return f"{value['start']:g} → {value['end']:g}" if isinstance(value, Mapping) else f"{value:g}"


def terms(group: Mapping[str, Mapping[str, Any]]) -> str:
    return "<br>".join(
        f"{weight(term)} × {term['_target_'].split('.')[-1]}: {summary(term['_target_'])}" for term in group.values()
    )


def forwards(cfg: DictConfig) -> int:
    """Passes over the batch that one step makes, forward and backward, counted on a small net."""
    torch.manual_seed(0)
    gate = CASGate(channels=4, num_classes=3)  # an auxiliary head, for the term that trains one
    body = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), gate, nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(*body, nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    defense = instantiate(cfg.defense, _convert_="all")
    defense.prepare(net, x, y)
    seen: list[int] = []
    net.register_forward_pre_hook(lambda _net, images: seen.append(len(images[0])))
    defense.at(LIVE, 0)
    defense(net, x, y).loss.backward()
    return sum(seen) // len(x)


def cost(cfg: DictConfig) -> str:
    """Forwards a step, as a formula of the attack's steps K where those can be chosen; or that it is refused."""
    try:
        if "steps" not in (cfg.defense.attack or {}):
            return str(forwards(cfg))
        two, three = (forwards(changed(cfg, defense__attack__steps=k)) for k in (2, 3))
    except InstantiationException:
        return "refused"
    slope = three - two
    return f"{'' if slope == 1 else slope}K + {two - 2 * slope}"


def defenses() -> list[str]:
    rows = [
        "| `defense=` | method | loss | attack | forwards | + `[pse]` | + `awp.gamma` |",
        "|---|---|---|---|---|---|---|",
    ]
    for word in words("defense"):
        cfg = config(word)
        attack = "none"
        if cfg.defense.attack is not None:
            named = [cfg.defense.attack._target_]
            if objective := cfg.defense.attack.get("objective"):
                named.append(objective._target_)
            attack = "<br>".join(f"{target.split('.')[-1]}: {summary(target)}" for target in named)
        costs = cost(cfg), cost(changed(cfg, regularizers=regularizer("pse"))), cost(changed(cfg, awp__gamma=0.01))
        rows.append(f"| `{word}` | {source('defense', word)} | {terms(cfg.defense.loss)} | {attack} | {' | '.join(costs)} |")
    return rows


def regularizers() -> list[str]:
    rows = [
        "| `regularizers=[…]` | method | terms | further forwards on PGD-AT | on TRADES | without attack |",
        "|---|---|---|---|---|---|",
    ]
    bases = [changed(config(word), defense__attack__steps=1) for word in ("pgd_at", "trades")]
    bare = [forwards(cfg) for cfg in bases]
    none = config("none")
    for word in words("regularizers"):
        group = regularizer(word)
        extra = [forwards(changed(cfg, regularizers=group)) - plain for cfg, plain in zip(bases, bare, strict=True)]
        alone = cost(changed(none, regularizers=group))
        shown = changed(none, regularizers=group).regularizers
        rows.append(
            f"| `{word}` | {source('regularizers', word)} | {terms(shown)} | {extra[0]} | {extra[1]} "
            f"| {alone if alone == 'refused' else 'allowed'} |"
        )
    return rows


def peers() -> list[str]:
    """Networks that differ from an ordinary one by a gate, and what their YAML expects of the sanity checks."""
    rows = ["| `network=` | method | gate | sanity checks |", "|---|---|---|---|"]
    for word in words("network"):
        network = OmegaConf.load(ROOT / "configs" / "network" / f"{word}.yaml")
        if "gate" in network:
            verdict = comment("network", word, 1).removeprefix("Sanity checks: ")
            rows.append(f"| `{word}` | {source('network', word)} | {summary(network.gate._target_)} | {verdict} |")
    return rows


# ruff: noqa: E501 (a row of a Markdown table is one line)
OPTIONS = """\
| key | what it does | forwards |
|---|---|---|
| `awp.gamma=0.005` `awp.warmup=EPOCHS` | {awp} | those of the base loss once more |
| `ema=0.999` | Running average of weights and BatchNorm statistics (Lightning's), judged, kept and shown in their place. | 0 |
| `defense.attack.replays=4` (`free_at`) | Each batch is trained on so many times: divide `trainer.max_epochs` by it. | 1 an optimiser step |
| `defense.passes=auto` | Whose statistics BatchNorm uses where x and x' are both read: `joined`, `shared`, `separate` (as most published codes; refused with terms that compare x and x'). | 0 |
| `defense.attack_batchnorm=running` | The statistics that the attack sees: `running`, or `batch` as some published codes. | 0 |
| `defense.eps_share=1` `defense.step_share=1` | Share of ε and of the step size in training, a number or a ramp over epochs; evaluation attacks keep the whole ε. | 0 |
| `defense.loss.TERM.label_smoothing=0.1` | Cross-entropy against (1 − s)·onehot + s/K (Szegedy et al. 2016, 1512.00567). | 0 |
| any weight | A number or a ramp over epochs, `{{_target_: glassarmor.defenses.Ramp, start: 0, end: 1, epochs: 5}}`; 0 throughout is absent. | |
"""


def page() -> str:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        parts = [
            "# Methods",
            "Written by `python docs/catalogue.py` from the configs, the docstrings of what they name, and forwards counted in "
            "one training step, in passes over the batch; K is `defense.attack.steps`. Any regulariser goes on any defense.",
            "## Training methods",
            "\n".join(defenses()),
            "## Regularisers",
            "\n".join(regularizers()),
            "## Architecture peers",
            "Gates behind one layer of any network (`network=cas network@network.base=resnet18`), our readings of the papers' "
            "ideas: no label and no detached mask in the evaluated forward, so attacks go through the gate. Their auxiliary "
            "heads are trained by `regularizers=[auxiliary]`. The verdicts are what we expect of checks for masked "
            "gradients; what a small net showed is in [findings](findings.md).",
            "\n".join(peers()),
            "## Options of any of them",
            OPTIONS.format(awp=summary("glassarmor.defenses.AWP")).strip(),
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads of tiny passes wait longer for each other than they work
    PAGE.write_text(page(), encoding="utf-8")
