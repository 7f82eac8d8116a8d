"""The one LightningModule: a network, a defense, and the metrics that tell whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import CatMetric, MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from glassarmor.defenses.attacks.draws import seed_of
from glassarmor.defenses.attacks.pgd import Attack
from glassarmor.defenses.training.defense import Defense
from glassarmor.interpret.modes import logits_in
from glassarmor.lightning_modules.learning import rate_factors, require_learning, scale_rates

Batch = tuple[Tensor, Tensor]


class Diverged(FloatingPointError):
    """A loss that is not finite, which nobody sees to: training can't go on."""


class RobustClassifier(pl.LightningModule):
    """Robust training of a classifier.

    Args:
        net: images in [0,1], (N, C, H, W), to logits (N, K); normalisation inside.
        defense: computes the training loss; prepared (:meth:`Defense.prepare`) before training starts.
        val_attack: attack for the held-out robust accuracy that selects the best checkpoint.
        num_classes: K.
        optimizer: parameters → optimizer.
        scheduler: (optimizer, total_steps) → per-step schedule.
        lr_factors: names of layers, with ``*`` as in file names → what multiplies their learning rate.
        seed: every random number of a step is a function of this seed and the step, so that a resumed run repeats an
            uninterrupted one without saving generator states.
    """

    def __init__(
        self,
        net: nn.Module,
        defense: Defense,
        val_attack: Attack,
        num_classes: int,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        seed: int = 0,
        lr_factors: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.defense = defense
        self.val_attack = val_attack
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.seed = seed
        self.lr_factors = lr_factors
        self.rescue: Callable[[str], bool] = lambda message: False  # True: the step is skipped, and someone sees to it
        # None looks at values to check them, for which every step would wait for the device.
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_terms = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in defense.named_terms()})
        for metric in self._epoch_metrics():
            metric.persistent(True)  # an epoch may be resumed in its middle
        self.broken_logits = SumMetric(nan_strategy="disable")  # that are not finite, on the images judged last
        self.held_out = CatMetric(nan_strategy="disable")  # (N, 3): label, answer to the clean image, right under attack?
        self.num_classes = num_classes
        self.clean = nn.ModuleDict({s: MulticlassAccuracy(num_classes, average="micro") for s in ("val", "test")})
        self.robust = nn.ModuleDict({s: MulticlassAccuracy(num_classes, average="micro") for s in ("val", "test")})

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images in [0,1]: the plain network, no interpretation inside."""
        logits: Tensor = logits_in(self.net(x))
        return logits

    def on_validation_epoch_start(self) -> None:
        self.broken_logits.reset()
        self.held_out.reset()

    def _epoch_metrics(self) -> list[Metric]:
        """What is summed over an epoch of training."""
        found = (self.train_accuracy, self.train_loss, *self.train_terms.values())
        return [metric for metric in found if isinstance(metric, Metric)]

    def on_train_epoch_start(self) -> None:
        # A checkpoint of an epoch's end holds its sums; an epoch that is resumed in its middle does not come by here.
        for metric in self._epoch_metrics():
            metric.reset()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        x, y = batch
        draw = self.global_step * self.trainer.world_size + self.global_rank
        torch.manual_seed(seed_of(self.seed, draw))  # dropout and the like
        self.defense.at(self.current_epoch + batch_idx / max(1, float(self.trainer.num_training_batches)), draw)
        out = self.defense(self.net, x, y)
        self.train_accuracy(out.obs.adv.logits.detach(), y)
        self.train_loss(out.loss.detach())
        # Reading the loss waits for the device: each step on a CPU, else as often as losses are logged.
        look = self.device.type == "cpu" or self.global_step % max(1, self.trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        if look and not torch.isfinite(out.loss):
            terms = ", ".join(f"{name} {float(value):.4g}" for name, value in out.terms.items())
            message = f"training diverged at step {self.global_step}: {terms}"
            if self.rescue(message):
                return None
            raise Diverged(message)
        name = "train/clean_acc" if self.defense.attack is None else "train/robust_acc"
        self.log(name, self.train_accuracy, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        for name, value in out.terms.items():  # as they enter the total, so that they add up to it
            term = self.train_terms[name]
            assert isinstance(term, Metric)
            term(out.weights[name] * value)
            self.log(f"train/loss/{name}", term, on_step=True, on_epoch=True)
        return out.loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # Before any checkpoint of this epoch, and on every process: the estimates are reduced over processes here.
        if self.trainer.is_last_batch:
            self.defense.end_epoch()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._judge("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._judge("test", batch, batch_idx)

    def _judge(self, split: str, batch: Batch, batch_idx: int) -> None:
        """Clean and robust accuracy, in full precision whatever the training used."""
        x, y = batch
        clean, robust = self.clean[split], self.robust[split]
        assert isinstance(clean, MulticlassAccuracy)
        assert isinstance(robust, MulticlassAccuracy)
        self.val_attack.reseed(batch_idx)
        with torch.autocast(self.device.type, enabled=False):
            x_adv = self.val_attack(self.net, x, y)
            with torch.no_grad():
                answers = self(x).float(), self(x_adv).float()
                clean(answers[0], y)
                robust(answers[1], y)
                if split == "val":
                    labels = [y, answers[0].argmax(1), answers[1].argmax(1) == y]
                    self.held_out.update(torch.stack([value.float() for value in labels], 1))
                self.broken_logits.update((~torch.stack(answers).isfinite()).sum())
            if split == "val" and batch_idx == 0 and self.defense.prepared:
                for name, (value, gap) in self.defense.signal_gap(self.net, x.clone(), x_adv, y.clone()).items():
                    self.log(f"val/signal/{name}", value, batch_size=len(y), sync_dist=True)
                    self.log(f"val/signal_gap/{name}", gap, batch_size=len(y), sync_dist=True)
        self.log(f"{split}/clean_acc", clean, prog_bar=True)
        self.log(f"{split}/robust_acc", robust, prog_bar=True)

    def optimizer(self) -> Optimizer:
        """A new optimiser of what the network learns.

        Raises:
            ValueError: nothing learns, or as :func:`.rate_factors`.
        """
        require_learning(self.net)
        if not self.lr_factors:
            return self.make_optimizer(self.net.parameters())
        groups = rate_factors(self.net, self.lr_factors)
        optimizer = self.make_optimizer([{"params": parameters} for parameters in groups.values()])
        scale_rates(optimizer, groups)
        return optimizer

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
