"""Attacks confined to a part of the image: the regions that class activation maps find discriminative, or a control."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.draws import seed_of
from glassarmor.defenses.attacks.objectives import Targeted
from glassarmor.defenses.attacks.pgd import Attack
from glassarmor.defenses.options import require_number, require_one_of
from glassarmor.defenses.threat import Threat
from glassarmor.interpret.inputs import borrowed
from glassarmor.interpret.modes import as_module
from glassarmor.interpret.observation import feature_layers, find_layers, observe, strongest_wrong
from glassarmor.interpret.signals.cam import class_activation_map, class_region


class Masked(nn.Module):
    """``net`` as a function of the supported pixels alone: the others are those of x, whatever is passed in.

    An attack on this net needs to know nothing of the support: its gradient is the true one inside, exactly zero outside,
    and the image that counts is :meth:`compose` of what it returns, bit for bit the one that was judged.

    Args:
        net: maps images to logits.
        x: (N, C, H, W).
        support: where δ may differ from zero, bool, broadcastable to x.

    Raises:
        ValueError: in the forward, another number of images than the support was made for.
    """

    def __init__(self, net: nn.Module, x: Tensor, support: Tensor) -> None:
        super().__init__()
        self.net, self.x, self.support = net, x, support

    def compose(self, x_adv: Tensor) -> Tensor:
        """x' inside the support, x outside."""
        if x_adv.shape != self.x.shape:  # broadcasting would pair images with the wrong supports
            raise ValueError(
                f"attack: a supported attack keeps its batch together, shape {tuple(self.x.shape)}; "
                f"found images of shape {tuple(x_adv.shape)}"
            )
        return torch.where(self.support, x_adv, self.x)

    def forward(self, x_adv: Tensor) -> Tensor:
        logits: Tensor = self.net(self.compose(x_adv))
        return logits


class Supported:
    """Any attack with δ = 0 outside the discriminative regions B_t0 ∪ B_t of the clean image.

    B_c is :func:`.class_region`.  That C&W and PGD can be refined so is
    the idea of arXiv 1904.02057; the choice of layer, of t, and the way it is done (:class:`Masked`) are ours.

    Is a base attack right that knows nothing of the support?  Minimum-norm attacks: yes, the gradient outside is zero and
    the distance penalty keeps δ at zero there, so what they minimise is the distortion inside.  L∞: yes, each pixel has
    its own budget.  L2 balls from ``start="none"``: yes, δ never leaves the support.  L2 balls from a random start: valid
    but slightly weak, for the part of the start that lies outside uses up budget until the projections have shrunk it.

    Args:
        attack: any attack that keeps its batch together; its own objective says whether it is targeted.
        layer: whose maps are used; None takes the last feature layer.
        quantile: q in [0,1): each of the two maps gives a share 1 − q of the pixels; 0 allows all of them.
        where: "cam", or a control with as many pixels: "shifted" rolls each support by a random offset, so that its shape
            stays too; "random" draws the pixels.
        seed: of the controls' own generator.

    Raises:
        ValueError: a quantile outside [0,1), another ``where``, or (when called) an unknown layer.
    """

    def __init__(
        self,
        attack: Attack,
        layer: str | None = None,
        quantile: float = 0.8,
        where: Literal["cam", "shifted", "random"] = "cam",
        seed: int = 0,
    ) -> None:
        require_number("attack.quantile", quantile, "[0, 1)")
        require_one_of("attack.where", where, ("cam", "shifted", "random"))
        self.attack = attack
        self.layer = layer
        self.quantile = quantile
        self.where = where
        self.seed = seed
        self.calls = 0

    @property
    def threat(self) -> Threat:
        """That of the attack inside: setting δ to zero on some pixels leaves no norm ball."""
        return self.attack.threat

    def reseed(self, call: int) -> None:
        self.calls = call
        self.attack.reseed(call)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (N, C, H, W), equal to x outside the support; see :class:`.Attack`."""
        net = as_module(net)
        with borrowed(net, x, y) as (x, y):
            masked = Masked(net, x, self.support(net, x, y))
            self.calls += 1
            return masked.compose(self.attack(masked, x, y))

    def support(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Where the next call may change the images, bool, (N, 1, H, W).

        t is the class that the attack inside aims at, else the strongest wrong class at x.

        Raises:
            ValueError: ``layer`` is no layer of the net, or has no positions.
        """
        if self.layer is not None:
            find_layers(net, [self.layer], key="attack.layer")
        with borrowed(net, x, y) as (x, y):
            layer = self.layer or feature_layers(net, x[:1])[-1]
            with torch.no_grad():
                logits = net(x)
            aim = aim_of(self.attack)
            target = strongest_wrong(logits, y) if aim is None else aim.target(y, logits.shape[1])
            obs = observe(net, x, x, y, target=target, layers=[layer])
            size = (x.shape[-2], x.shape[-1])
            true, promoted = (
                class_region(class_activation_map(obs, layer, label).detach(), size, self.quantile)
                for label in ("true", "target")
            )
        return self._moved((true | promoted)[:, None])

    def _moved(self, support: Tensor) -> Tensor:
        """The support itself, or the control of the same size."""
        if self.where == "cam":
            return support
        n, _, height, width = support.shape
        generator = torch.Generator(support.device).manual_seed(seed_of(self.seed, self.calls))
        if self.where == "shifted":
            offsets = torch.rand((n, 2), generator=generator, device=support.device)
            rolls = [(int(down * height), int(right * width)) for down, right in offsets.tolist()]
            return torch.stack([one.roll(roll, (-2, -1)) for one, roll in zip(support, rolls, strict=True)])
        ranks = torch.rand(support.shape, generator=generator, device=support.device).flatten(1).argsort(1).argsort(1)
        return (ranks < support.flatten(1).sum(1, keepdim=True)).view_as(support)


def aim_of(attack: Attack) -> Targeted | None:
    """The targeted objective of an attack that has one."""
    aim = getattr(attack, "objective", None)
    return aim if isinstance(aim, Targeted) else None
