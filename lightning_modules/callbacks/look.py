"""One look into a network: the same images, attacked once, observed once; every panel measures and draws from that."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.pgd import Attack
from glassarmor.defenses.threat import Threat
from glassarmor.interpret.inputs import checked
from glassarmor.interpret.modes import in_float32, undisturbed
from glassarmor.interpret.observation import feature_layers, find_layers, observe
from glassarmor.interpret.views.draw.figures import to_array
from glassarmor.interpret.views.view import Panel, Probe, View


class RehearsalAttack:
    """Stands in for an attack in rehearsals, where a real one may take minutes: a small fixed change of each image."""

    def __init__(self, threat: Threat) -> None:
        self.threat = threat

    def reseed(self, call: int) -> None:
        pass

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
        return (x + 0.05 * noise).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """The images that are looked at.

    x, y, ids: images (N, C, H, W) in [0,1], their labels (N,) and names.  class_names: by class index.
    training: training images (M, C, H, W) in [0,1] and labels (M,), for panels that show the others before them.

    Raises:
        ValueError: images outside [0,1], or labels of another shape or type (:func:`.checked`).
    """

    x: Tensor
    y: Tensor
    ids: tuple[str, ...]
    class_names: tuple[str, ...]
    training: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        x, y, _ = checked(nn.Identity(), self.x, self.y)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    def first(self, n: int) -> ProbeSet:
        return replace(self, x=self.x[:n], y=self.y[:n], ids=self.ids[:n])


@dataclass(frozen=True, eq=False)
class Look:
    """What is looked at, under which attack, by which panels.

    Leaves a network as it was: weights, buffers, gradients, modes and random numbers are the same with it and without.
    Looks in float32, whatever the precision of the weights.

    panels: by name.  attack: draws the same random numbers each time, so that two looks compare.
    layers: observed layers; by default the stages of the network.
    run, command: the run folder, and what trained it: for proposed command lines.
    """

    panels: Mapping[str, Panel]
    probe_set: ProbeSet
    attack: Attack
    layers: tuple[str, ...] = ()
    run: str = "RUN"
    command: str = "python train.py"

    def prepared(self, net: nn.Module) -> Look:
        """The same with the layers chosen and checked.

        Raises:
            ValueError: a layer that the network does not have.
        """
        if self.layers:
            find_layers(net, self.layers)
            return self
        if not self.panels:
            return self
        try:
            with in_float32(net):
                return replace(self, layers=tuple(feature_layers(net, self.probe_set.x[:2])))
        except ValueError as error:
            raise ValueError(f"{error}, or leave the panels out") from None

    def rehearse(self, net: nn.Module) -> None:
        """Draw every panel once for two images, before any training: what would fail at the end of an epoch fails now.

        Raises:
            ValueError: a panel that cannot be drawn for this network and these images; names it.
        """
        few = replace(self, probe_set=self.probe_set.first(2), attack=RehearsalAttack(self.attack.threat))
        device = next((p.device for p in net.parameters()), self.probe_set.x.device)
        for name, panel in self.panels.items():
            try:
                for view in replace(few, panels={name: panel}).views(net, device, {}):
                    if view.drawing is not None:
                        to_array(view.drawing)
            except Exception as error:
                raise ValueError(f"panels.{name}: {error}") from error

    def views(
        self,
        net: nn.Module,
        device: torch.device,
        scalars: Mapping[str, float],
        tell: Callable[[str], object] = lambda step: None,
        strict: bool = True,
    ) -> list[View]:
        """Of all panels for the network as it is now; ``tell`` hears what is being done.

        With ``strict=False`` a panel that fails says so in its place: drawing ends no run.
        """
        forked = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(forked), torch.autocast(device.type, enabled=False), in_float32(net):
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
        """The images, attacked and observed in the network as it is now."""
        of = self.probe_set
        x, y = of.x.to(device), of.y.to(device)
        layers = self.layers or self.prepared(net).layers
        self.attack.reseed(0)
        x_adv = self.attack(net, x, y)
        with undisturbed(net):
            obs = observe(net, x, x_adv, y, layers=layers)
        training = None if of.training is None else (of.training[0].to(device), of.training[1].to(device))
        return Probe(net, obs, layers, of.ids, of.class_names, scalars, training, self.run, self.command)
