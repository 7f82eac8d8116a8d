"""Every YAML composes, instantiates, and takes a training step."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import get_object, instantiate

from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.lightning_modules.commands import train
from tests.composing import CONFIGS, SMALL, config, options


def step(*overrides: str) -> tuple[train.Parts, float]:
    """Build, run one optimiser step on one batch, and check that it learned something finite.

    Returns:
        the parts, and the passes over the batch that the step made.
    """
    parts = train.build(config(*overrides))
    module = parts.module
    x, y = (part[:8] for part in next(iter(parts.data.train_dataloader())))
    optimizer = module.make_optimizer(module.net.parameters())
    if module.make_scheduler is not None:
        module.make_scheduler(optimizer, total_steps=10)
    before = [p.detach().clone() for p in module.net.parameters()]
    seen: list[int] = []
    module.net.register_forward_pre_hook(lambda _net, images: seen.append(len(images[0])))
    module.train()
    module.defense.at(1.0, 0)  # a weight that ramps up from 0 is live
    out = module.defense(module.net, x, y)
    out.loss.backward()
    optimizer.step()
    assert torch.isfinite(out.loss)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.net.parameters(), strict=True))
    return parts, sum(seen) / len(x)


REGULARIZERS = ["[]", "[pse]", "[sensitivity]", "[pse,sensitivity]", "[cam_discrepancy]"]
BUDGET = {  # passes over the batch in one step with K attack steps: bare, with any regulariser
    "none": (lambda k: 1, None),
    "pgd_at": (lambda k: k + 1, lambda k: k + 2),
    "trades": (lambda k: k + 3, lambda k: k + 3),
    "mart": (lambda k: k + 2, lambda k: k + 2),
    "alp": (lambda k: k + 2, lambda k: k + 2),
    "fgsm_rs": (lambda k: 2, lambda k: 3),
    "n_fgsm": (lambda k: 2, lambda k: 3),
    "nuat": (lambda k: k + 3, lambda k: k + 3),
    "free_at": (lambda k: 1, lambda k: 2),
}
# Terms that make passes of their own instead of reading the clean one, or beside it.
PASSES = {"grad_align": 2, "local_linearity": 2, "gradient_norm": 1}


def test_the_budget_names_every_defense() -> None:
    assert sorted(BUDGET) == options("defense")


def forwards(*overrides: str) -> tuple[float, int]:
    """Passes over the batch in one step, counted, and the attack's steps."""
    parts, passes = step(*SMALL, "panels=[]", *overrides)
    attack = parts.module.defense.attack
    return passes, attack.steps if isinstance(attack, PGD) else 0


EVERY_PAIR = [  # a third of the pairs, every word of both among them, is enough for each run of the fast tests
    pytest.param(*pair, marks=[] if (i + i // len(REGULARIZERS)) % 3 == 0 else [pytest.mark.long])
    for i, pair in enumerate(itertools.product(BUDGET, REGULARIZERS))
]


@pytest.mark.parametrize(("defense", "regularizers"), EVERY_PAIR)
def test_every_defense_takes_every_regularizer_within_its_budget(defense: str, regularizers: str) -> None:
    overrides = [*SMALL, f"defense={defense}", f"regularizers={regularizers}", "panels=[]"]
    bare, regularised = BUDGET[defense]
    expected = bare if regularizers == "[]" else regularised
    if expected is None:
        with pytest.raises(Exception, match="has no attack") as error:
            step(*overrides)
        assert "regularizers." in str(error.value)
        return
    parts, passes = step(*overrides)
    taken = parts.module.defense
    assert "[" + ",".join(taken.regularizer_names) + "]" == regularizers
    assert passes == expected(taken.attack.steps if isinstance(taken.attack, PGD) else 0)


@pytest.mark.long
@pytest.mark.parametrize("defense", [name for name in BUDGET if name != "none"])
def test_other_terms_and_options_stay_in_budget(defense: str) -> None:
    bare, regularised = BUDGET[defense]
    word = f"defense={defense}"
    quick = ["defense.attack.steps=2"] if defense in ("pgd_at", "trades", "mart", "alp") else []
    schedule = [] if defense == "free_at" else ["defense.attack_batchnorm=batch", "defense.eps_share=0.5"]
    found, k = forwards(word, *quick, *schedule, "regularizers=[grad_align,gradient_norm,local_linearity]")
    assert found == bare(k) + sum(PASSES.values())
    own = 2 if bare(k) == regularised(k) else 1  # passes of the base loss, which alone moves the weights
    found, k = forwards(word, *quick, "regularizers=[consistency]", "awp.gamma=0.01", "defense.passes=shared")
    assert found == regularised(k) + own
    found, k = forwards(word, *quick, "regularizers=[]", "defense.passes=separate")
    assert found == bare(k)


def test_terms_that_need_no_attack_stay_in_budget() -> None:
    assert forwards("defense=none", "regularizers=[gradient_norm]")[0] == 1 + PASSES["gradient_norm"]
    search = "regularizers.local_linearity.steps=4"
    assert forwards("defense=none", "regularizers=[local_linearity]", search)[0] == 1 + 3 + 4


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(n, marks=[pytest.mark.long] if n in ("preact_resnet18", "cifs", "fsr", "timm", "cas") else [])
        for n in options("network")
        if not n.startswith(("wrn", "imported"))
    ],
)
def test_every_network_steps(network: str) -> None:
    small = [s for s in SMALL if not s.startswith("network.")]
    name = ["network.name=squeezenet1_1"] if network == "torchvision" else []
    step(*small, *name, f"network={network}", "defense=n_fgsm", "regularizers=[pse,sensitivity]", "panels=[]")


@pytest.mark.long
@pytest.mark.parametrize("network", ["wrn28_10", "wrn34_10"])
def test_wide_networks_step(network: str) -> None:
    small = [s for s in SMALL if not s.startswith("network.")]
    step(*small, f"network={network}", "defense=n_fgsm", "regularizers=[]", "panels=[]")


def test_imported_network_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def make(classes):\n"
        "    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), *head)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = [s for s in SMALL if not s.startswith("network.")]
    step(*small, "network=imported", "network.target=my_models:make", "+network.args.classes=10", "panels=[]")


@pytest.mark.long
@pytest.mark.parametrize(
    ("group", "name"),
    [(g, n) for g in ("optimizer", "scheduler", "threat", "regularizers") for n in options(g)],
)
def test_every_small_group_steps(group: str, name: str) -> None:
    choice = f"[{name}]" if group == "regularizers" else name
    # Auxiliary heads are a peer's affair.
    size = ["network=cas", "network.base.width=0.25", *SMALL[1:]] if name == "auxiliary" else SMALL
    step(*size, "panels=[]", "defense=pgd_at", "defense.attack.steps=2", f"{group}={choice}")


@pytest.mark.parametrize("name", options("trainer"))
def test_every_trainer_instantiates(name: str) -> None:
    trainer = instantiate(config(f"trainer={name}").trainer, logger=False, enable_checkpointing=False)
    assert trainer.max_epochs >= 1


@pytest.mark.parametrize("name", [n for n in options("data") if n not in ("digits", "shapes")])
def test_every_dataset_composes_and_says_what_is_missing(name: str, tmp_path: Path) -> None:
    """None of these is at hand here: the message must name the key that brings it."""
    missing = tmp_path / "nowhere"
    key = "data.path" if name in ("arrays", "image_folder") else "data.root"
    cfg = config(f"data={name}", f"{key}={missing}", "panels=[]")
    assert 0 < train.instantiate(cfg.threat).eps <= 1
    with pytest.raises((ValueError, OSError), match="data") as error:
        train.build(cfg)
    assert key in str(error.value) or "data.download" in str(error.value)


def test_every_panel_instantiates() -> None:
    names = ",".join(options("panels"))
    assert sorted(train.build(config(*SMALL, f"panels=[{names}]")).panels) == options("panels")


def test_experiments_compose() -> None:
    for name in options("experiment"):
        assert config(f"experiment={name}").data is not None


# Where a YAML says something else than the class does by itself, and why.
ON_PURPOSE = {
    "Augment.pad": "the dataset's own",
    "Augment.flip": "the dataset's own",
    "APGD.objective": "None stands for it",
    "PGD.objective": "the recipe of TRADES and of NuAT",
    "PGD.start": "the recipe of TRADES and of NuAT",
    "PGD.steps": "10 train, 20 judge; NuAT has one",
    "PGD.seed": "each attack of a run its own",
    "NuclearNorm.weight": "the recipe's ramp",
    "LogitPairing.weight": "off until it is asked for",
    "wide_resnet.depth": "the name of the YAML",
    **dict.fromkeys(
        [f"{name}.augment" for name in ("Arrays", "CIFAR10", "CIFAR100", "Digits", "ImageFolder", "SVHN")],
        "who loads images in Python gets them as they are",
    ),
}


def blocks(node: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a YAML that make something of ours."""
    if isinstance(node, Mapping):
        if str(node.get("_target_", "")).startswith("glassarmor."):
            yield node
        for value in node.values():
            yield from blocks(value)
    elif isinstance(node, list):
        for value in node:
            yield from blocks(value)


def test_a_class_by_itself_is_what_its_yaml_says() -> None:
    """Else a regulariser that a user makes in Python has another weight than the one of the same name on a command line."""
    differs = set()
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if path.parent.name in ("experiment", "study"):  # each another set of values, that is what they are for
            continue
        for block in blocks(yaml.safe_load(path.read_text(encoding="utf-8"))):
            known = inspect.signature(get_object(block["_target_"])).parameters
            for key, value in block.items():
                if key not in known or known[key].default is inspect.Parameter.empty or str(value).startswith("${"):
                    continue
                found = instantiate(value, _convert_="all") if isinstance(value, Mapping) else value
                default = known[key].default
                if isinstance(default, Mapping) and isinstance(found, Mapping) and key == "actions":
                    default = dict.fromkeys(found, "warn") | default
                if (list(default) if isinstance(default, tuple) else default) != found:
                    differs.add(f"{block['_target_'].rpartition('.')[2]}.{key}")
    assert differs == set(ON_PURPOSE)
