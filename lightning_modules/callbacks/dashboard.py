"""Each epoch a look at the network, handed with the epoch's metrics to the run's log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.pgd import Attack
from glassarmor.defenses.options import require_whole
from glassarmor.interpret.views.view import Panel, View
from glassarmor.lightning_modules.callbacks.look import Look, ProbeSet
from glassarmor.lightning_modules.run.log import RunLog


def check_every(every_n_epochs: object) -> None:
    """Raises ValueError unless panels can be drawn so often."""
    require_whole("every_n_epochs", every_n_epochs, 1)


def net_inside(module: Any) -> nn.Module:
    """``module.net``, or the module itself."""
    net: nn.Module = getattr(module, "net", module)
    return net


class Dashboard(pl.Callback):
    """Draws the panels at the end of each epoch and hands them, with the epoch's metrics, to the run's log.

    Leaves the module as it was: weights, buffers, gradients, modes and random numbers are the same with it and without.

    Args:
        panels: by name; empty logs the metrics alone.
        x, y, ids: the probe images (N, C, H, W) in [0,1], their labels (N,) and names.
        attack: draws the same random numbers each epoch, so that pictures of different epochs compare.
        class_names: by class index.
        layers: observed layers; by default the stages of the network.
        every_n_epochs: how often panels are drawn (the last epoch always); metrics go out each epoch.
        log: where it all goes, from :func:`.open_log`; may be set until ``fit`` as ``log_to``.
        training: training images (M, C, H, W) in [0,1] and labels (M,), for panels that show the probe before them.

    Raises:
        ValueError: images outside [0,1], or labels of another shape or type (:func:`.checked`).

    Shows ``module.net``, or the module itself; set ``net_of`` to show another, e.g. the average of the weights.
    """

    def __init__(
        self,
        panels: Mapping[str, Panel],
        x: Tensor,
        y: Tensor,
        ids: Sequence[str],
        attack: Attack,
        class_names: Sequence[str],
        layers: Sequence[str] = (),
        every_n_epochs: int = 1,
        log: RunLog | None = None,
        training: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        check_every(every_n_epochs)
        images = ProbeSet(x, y, tuple(ids), tuple(class_names), training)
        self._fill(Look(dict(panels), images, attack, tuple(layers)), every_n_epochs, log, net_inside, tuple)
        self.rehearsed = False

    @classmethod
    def of(
        cls,
        shown: Look,
        every_n_epochs: int,
        log: RunLog,
        net_of: Callable[[Any], nn.Module] = net_inside,
        lead: Callable[[], Sequence[View]] = tuple,
    ) -> Dashboard:
        """From a look that was rehearsed; ``lead``: views of others that come first, e.g. the run's health."""
        check_every(every_n_epochs)
        made = cls.__new__(cls)
        made._fill(shown, every_n_epochs, log, net_of, lead)
        return made

    def _fill(
        self,
        shown: Look,
        every_n_epochs: int,
        log: RunLog | None,
        net_of: Callable[[Any], nn.Module],
        lead: Callable[[], Sequence[View]],
    ) -> None:
        self.shown = shown
        self.every_n_epochs = every_n_epochs
        self.log_to = log
        self.net_of = net_of
        self.lead = lead
        self.rehearsed = True
        self.waiting: tuple[int, int, dict[str, float]] | None = None  # an epoch that was not drawn

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """What would fail at the end of the first epoch fails now."""
        if self.log_to is None:
            raise ValueError("log: expected a RunLog, e.g. open_log('my-run'); found none")
        if not self.rehearsed and self.shown.panels:
            net = self.net_of(pl_module)
            self.shown = self.shown.prepared(net)
            self.shown.rehearse(net)
            self.rehearsed = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        epoch = int(trainer.current_epoch)
        scalars = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not name.endswith(("_step", "_epoch"))  # Lightning's second names of what it logs per step and epoch
        }
        for optimizer in trainer.optimizers[:1]:
            scalars["train/lr"] = float(optimizer.param_groups[0]["lr"])
        last = trainer.should_stop or 0 < (trainer.max_epochs or -1) <= epoch + 1
        drawn = last or epoch % self.every_n_epochs == 0
        self._record(pl_module, epoch, int(trainer.global_step), scalars, drawn)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last epoch is drawn, also where nobody knew that it was the last: after so many steps, or so much time."""
        if self.waiting is not None and trainer.is_global_zero:
            self._record(pl_module, *self.waiting, drawn=True)

    def _record(self, pl_module: Any, epoch: int, step: int, scalars: dict[str, float], drawn: bool) -> None:
        assert self.log_to is not None
        views: list[View] = []
        if drawn and self.shown.panels:
            views = self.look(self.net_of(pl_module), pl_module.device, scalars, strict=False)
        self.waiting = None if views or not self.shown.panels else (epoch, step, scalars)
        self.log_to.epoch(epoch, step, scalars, [*self.lead(), *views])

    def look(self, net: nn.Module, device: torch.device, scalars: Mapping[str, float], strict: bool = True) -> list[View]:
        """:meth:`.Look.views`, with the run's own folder in what they propose."""
        shown = self.shown if self.log_to is None else replace(self.shown, run=str(self.log_to.folder))
        return shown.views(net, device, scalars, strict=strict)
