"""What a run came to: its networks judged on the test images, and the final table, which says what each number is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.pgd import Attack
from glassarmor.defenses.evaluation.accuracy import answers_to, correct_under
from glassarmor.defenses.monitoring.readings import count_nonfinite, watched_logits
from glassarmor.interpret.views.charts import Table
from glassarmor.lightning_modules.run.console import marked
from glassarmor.lightning_modules.run.processes import any_process
from glassarmor.lightning_modules.selection import Choice, knows_nothing

BEST: Final = "defended, best epoch"
UNDEFENDED: Final = "undefended"


@dataclass
class Outcome:
    """Accuracies by network and attack, in [0,1]; ``correct``: image by image, (N,) bool.

    ``not_finite`` and ``guessing`` name the networks whose accuracies mean nothing.
    """

    data: Any  # test images: whole_test, test, num_classes
    attacks: Mapping[str, Attack]
    device: torch.device
    records: dict[str, dict[str, float]] = field(default_factory=dict)
    correct: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    guessing: list[str] = field(default_factory=list)

    def judge(self, name: str, net: nn.Module) -> None:
        """To be called on every process."""
        with watched_logits(net.to(self.device)) as logits:
            self.correct[name] = correct_under(net, self.data.whole_test(), self.attacks, self.device)
        self.records[name] = {attack: float(right.double().mean()) for attack, right in self.correct[name].items()}
        if any_process(any(map(bool, logits))) or count_nonfinite(net)[0]:
            self.not_finite.append(name)
        elif knows_nothing(*answers_to(net, self.data.whole_test(), self.device), self.data.num_classes):
            self.guessing.append(name)

    def table(self, threat: str, choice: Choice | None) -> Table:
        """Rows of networks, columns of attacks, accuracies in percent; the title says what chose the epochs."""
        names = list(next(iter(self.records.values())))
        rows: list[tuple[str | float, ...]] = [
            (
                marked(network, network not in self.not_finite, network in self.guessing),
                *[round(100 * record[name], 2) for name in names],
            )
            for network, record in self.records.items()
        ]
        chosen = f"Best epoch: {choice.text()}. " if choice is not None and BEST in self.records else ""
        title = f"Accuracy on the test set, {len(self.data.test):,} images, {threat}. {chosen}Last epoch: not chosen"
        return Table(title, ("network", *[f"{name} (%)" for name in names]), rows)

    def notes(self, stopped: str) -> list[str]:
        """What the table must not be read without, in sentences."""
        found = [f"stopped      {stopped}"] if stopped else []
        if self.guessing:
            found.append(
                f"guessing     {' and '.join(self.guessing)}: no better than guessing, so their accuracies mean nothing"
            )
        if BEST not in self.records:
            found.append("best epoch   none: no epoch was finite and better than guessing on the held-out images")
        return found

    def results(self, threat: str, choice: Choice | None, stopped: str) -> dict[str, Any]:
        """What ``results.json`` holds."""
        selection: dict[str, Any] = {}
        if choice is not None:
            selection = {"best_epoch": choice.epoch, "held_out_robust": choice.robust, "selection": choice.text()}
        ended = {"stopped": stopped} if stopped else {}
        broken = {"not_finite": self.not_finite, "guessing": self.guessing}
        return {"threat": threat, **broken, **selection, **ended, **self.records}
