"""Our training and the plain loop, from the same initial weights, on the same batches, with the same random starts."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from glassarmor.lightning_modules.callbacks.averaging import averaging
from glassarmor.lightning_modules.commands import train
from tests.composing import config
from tests.reference.loops import Budget, judged
from tests.reference.loops import train as plain_loop

SEPARATE = ("defense.passes=separate",)  # two passes over x and x', as the published codes make them
BATCH = ("defense.attack_batchnorm=batch",)  # attacks in train mode, as the published codes of one-step methods


@dataclass(frozen=True)
class Method:
    """``loop`` names the plain loop; ``overrides`` make ours the same algorithm."""

    loop: str
    overrides: tuple[str, ...]
    awp: float = 0.0
    ema: float = 0.0


METHODS = {
    "PGD-AT": Method("pgd_at", ("defense=pgd_at",)),
    "TRADES": Method("trades", ("defense=trades", *SEPARATE)),
    "MART": Method("mart", ("defense=mart", *SEPARATE)),
    "ALP": Method("alp", ("defense=alp", *SEPARATE)),
    "Free-AT": Method("free_at", ("defense=free_at",)),
    "FGSM-RS": Method("fgsm_rs", ("defense=fgsm_rs", *BATCH)),
    "N-FGSM": Method("n_fgsm", ("defense=n_fgsm", *BATCH)),
    "NuAT": Method("nuat", ("defense=nuat", *SEPARATE)),
    "TRADES + AWP": Method("trades", ("defense=trades", *SEPARATE), awp=0.005),
    "PGD-AT + EMA": Method("pgd_at", ("defense=pgd_at",), ema=0.95),
}
ITERATED = ("pgd_at", "trades", "mart", "alp")
# Small, and long enough that the nets are robust at the end: accuracies that still climb scatter from seed to seed.
BUDGET = Budget(epochs=8, steps=3, eps=0.06)
SIZES = ("network.width=0.5", "data.batch_size=64")


def overrides(method: Method, budget: Budget) -> list[str]:
    """The command line of our side."""
    epochs = budget.epochs // 4 if method.loop == "free_at" else budget.epochs
    found = [*method.overrides, f"seed={budget.seed}", f"trainer.max_epochs={epochs}", f"threat.eps={budget.eps}"]
    found += ["regularizers=[]", "panels=[]", "trainer.accelerator=cpu", f"awp.gamma={method.awp}"]
    if method.loop in ITERATED:
        found.append(f"defense.attack.steps={budget.steps}")
    if method.loop == "nuat":
        found.append(f"defense.loss.nuclear.weight.epochs={budget.epochs / 2}")
    return found


@dataclass(frozen=True)
class Trained:
    """The net that both sides began with, the two that came out, and which held-out images each gets right, (N,) bool.

    Held out are test and validation images together: nothing was selected on either.
    """

    start: nn.Module
    ours: nn.Module
    plain: nn.Module
    clean: tuple[Tensor, Tensor]
    robust: tuple[Tensor, Tensor]

    def points(self) -> dict[str, float]:
        """Accuracies in %, ours and the plain loop's, and on how many images both are alike under attack."""
        rows = {"clean": self.clean, "PGD-20": self.robust}
        shares = {
            f"{name}, {side}": right
            for name, pair in rows.items()
            for side, right in zip(("ours", "plain"), pair, strict=True)
        }
        shares["agree"] = self.robust[0] == self.robust[1]
        return {name: 100 * share.double().mean().item() for name, share in shares.items()}


def trained(name: str, budget: Budget, sizes: tuple[str, ...]) -> Trained:
    """Train both sides of a method of :data:`METHODS`; ``sizes`` are overrides of network and data."""
    method = METHODS[name]
    cfg = config(*overrides(method, budget), *sizes)
    parts = train.build(cfg)
    start = copy.deepcopy(parts.module.net)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = instantiate(cfg.trainer, callbacks=averaging(method.ema or None), **quiet)
    trainer.fit(parts.module, datamodule=parts.data)

    data = instantiate(cfg.data, _convert_="all")
    data.setup("fit")
    plain = plain_loop(copy.deepcopy(start), data, method.loop, budget, method.awp, method.ema)

    held = [data.test, data.val]
    x = torch.cat([part.images for part in held]).float() / 255
    y = torch.cat([part.labels for part in held])
    ours = parts.module.net
    both = [judged(net, x, y, budget.eps) for net in (ours, plain)]
    return Trained(start, ours, plain, (both[0][0], both[1][0]), (both[0][1], both[1][1]))
