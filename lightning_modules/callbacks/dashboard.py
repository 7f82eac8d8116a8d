"""Each epoch: the same images, attacked once, observed once; every panel measures and draws from that."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.pgd import Attack
from glassarmor.defenses.threat import Threat
from glassarmor.interpret.inputs import checked
from glassarmor.interpret.modes import undisturbed
from glassarmor.interpret.observation import feature_layers, find_layers, observe
from glassarmor.interpret.views.view import Panel, Probe, View
from glassarmor.lightning_modules.run.log import RunLog


class RehearsalAttack:
    """Stands in for an attack in rehearsals, where a real one may take minutes: a small fixed change of each image."""

    def __init__(self, threat: Threat) -> None:
        self.threat = threat

    def reseed(self, call: int) -> None:
        pass

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
        return (x + 0.05 * noise).clamp(0, 1)


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
        log: where it all goes; may be set later as ``log_to``.
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
        if not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            raise ValueError(f"probe.every_n_epochs: expected a whole number >= 1, found {every_n_epochs!r}")
        self.panels = dict(panels)
        self.x, self.y, _ = checked(nn.Identity(), x, y)
        self.ids = tuple(ids)
        self.attack = attack
        self.class_names = tuple(class_names)
        self.log_to = log
        self.training = training
        self.run = "RUN"  # the run folder where there is no log, and what trained it: for proposed command lines
        self.command = "python train.py"
        self.net_of: Callable[[Any], nn.Module] = lambda module: getattr(module, "net", module)
        self.layers = tuple(layers)
        self.every_n_epochs = every_n_epochs
        self.lead: Callable[[], Sequence[View]] = tuple  # views of others that come first, e.g. the run's health

    def prepare(self, net: nn.Module) -> None:
        """Choose and check the layers before training.

        Raises:
            ValueError: a layer that the network does not have.
        """
        if self.layers:
            find_layers(net, self.layers, key="probe.layers")
        elif self.panels:
            try:
                self.layers = feature_layers(net, self.x[:2])
            except ValueError as error:
                raise ValueError(f"probe.{error}, or leave the panels out with panels=[]") from None

    def rehearse(self, net: nn.Module) -> None:
        """Draw every panel once for two images, before any training: what would fail at the end of an epoch fails now.

        Raises:
            ValueError: a panel that cannot be drawn for this network and these images; names it.
        """
        few = copy.copy(self)
        few.x, few.y, few.ids, few.attack = self.x[:2], self.y[:2], self.ids[:2], RehearsalAttack(self.attack.threat)
        device = next((p.device for p in net.parameters()), few.x.device)
        for name, panel in self.panels.items():
            few.panels = {name: panel}
            try:
                few.look(net, device, {})
            except Exception as error:
                raise ValueError(f"panels.{name}: {error}") from error

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
        last = trainer.max_epochs is not None and epoch + 1 >= trainer.max_epochs
        views: list[View] = []
        if self.panels and (last or epoch % self.every_n_epochs == 0):
            views = self.look(self.net_of(pl_module), pl_module.device, scalars, strict=False)
        assert self.log_to is not None, "Dashboard.log_to was never set"
        self.log_to.epoch(epoch, int(trainer.global_step), scalars, [*self.lead(), *views])

    def look(
        self,
        net: nn.Module,
        device: torch.device,
        scalars: Mapping[str, float],
        tell: Callable[[str], object] = lambda step: None,
        strict: bool = True,
    ) -> list[View]:
        """The views of all panels for the network as it is now; ``tell`` hears what is being done.

        With ``strict=False`` a panel that fails says so in its place: drawing ends no run.
        """
        forked = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(forked), torch.autocast(device.type, enabled=False):
            tell("attack")
            probe = self.probe(net, device, scalars)
            with undisturbed(net):
                views = []
                for name, panel in self.panels.items():
                    tell(name)
                    try:
                        views.append(panel(probe))
                    except Exception as error:
                        if strict:
                            raise
                        said = f"could not be drawn: {type(error).__name__}: {error}"
                        warnings.warn(f"panels.{name}: {said}; training goes on", stacklevel=2)
                        views.append(View(name, name.capitalize(), f"This panel {said}", ()))
                return views

    def probe(self, net: nn.Module, device: torch.device, scalars: Mapping[str, float]) -> Probe:
        """The probe images, attacked and observed in the network as it is now."""
        x, y = self.x.to(device), self.y.to(device)
        if not self.layers:
            self.prepare(net)
        self.attack.reseed(0)
        x_adv = self.attack(net, x, y)
        with undisturbed(net):
            obs = observe(net, x, x_adv, y, layers=self.layers)
        training = None if self.training is None else (self.training[0].to(device), self.training[1].to(device))
        run = self.run if self.log_to is None else str(self.log_to.folder)
        return Probe(net, obs, self.layers, self.ids, self.class_names, scalars, training, run, self.command)
