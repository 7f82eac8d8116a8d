"""Unit sensitivity: how much an attack moves each unit (Zhang et al. 1909.06978).

The relative form, its signed parts, the equal-norm noise control and the curves against attack strength are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from glassarmor.interpret.modes import channel_statistics, evaluating
from glassarmor.interpret.network.layouts import layouts_of
from glassarmor.interpret.observation import Observation, observe, record

EPS = 1e-6  # a dead unit has standard deviation 0 and moves by 0
SILENT: Final = 0.01  # a unit whose clean spread is below this part of its layer's mean: a ratio to nothing says nothing


def unit_change(obs: Observation, layer: str) -> Tensor:
    """Mean over positions of |ΔA_k| per sample, (N, C), fp32.  Absolute first: opposite changes must not cancel."""
    return obs.once("change", layer, lambda: _Change.apply(obs.clean.acts[layer], obs.adv.acts[layer]))


class _Change(torch.autograd.Function):
    """Keeps the two activations alone, which others keep anyway; the difference is never written down in fp32.

    Subtracting in the activations' own precision loses less than they themselves were rounded by.
    """

    @staticmethod
    def forward(ctx: Any, clean: Tensor, adv: Tensor) -> Tensor:
        ctx.save_for_backward(clean, adv)
        change = (adv - clean).abs_()
        return (change.flatten(2).float().mean(2) if change.dim() > 2 else change.float()).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        clean, adv = ctx.saved_tensors
        positions = clean[0, 0].numel()
        slope = (gradient / positions).to(adv.dtype).view(*gradient.shape, *[1] * (adv.dim() - 2))
        by_adv = (adv - clean).sign_().mul_(slope)
        return -by_adv, by_adv


def clean_statistics(obs: Observation, layer: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each unit over clean samples and positions, (C,) each, in graph."""
    clean = obs.clean.acts[layer]
    mean, variance = obs.once("statistics", layer, lambda: torch.stack(channel_statistics(clean)))
    return mean, variance


def unit_spread(obs: Observation, layer: str) -> Tensor:
    """Standard deviation of each unit over clean samples and positions, (C,), in graph."""
    _, variance = clean_statistics(obs, layer)
    return (variance + EPS**2).sqrt()  # inside the square root so that the gradient of a constant unit is finite


def unit_sensitivity(obs: Observation, layer: str) -> Tensor:
    """σ_k: mean over samples of :func:`unit_change`, (C,)."""
    return unit_change(obs, layer).mean(0)


def relative_unit_sensitivity(obs: Observation, layer: str, silent: float = 0.0) -> Tensor:
    """v_k = σ_k / std_k over clean data, (C,): units of different scale compare.

    Args:
        silent: units whose clean spread is below this part of the layer's mean count as 0 (see :func:`silent_units`).
            0 keeps them all, as a loss needs; :data:`SILENT` suits figures and rankings.
    """
    spread = unit_spread(obs, layer)
    relative = unit_sensitivity(obs, layer) / (spread + EPS)
    return relative.masked_fill(silent_units(spread, silent), 0) if silent else relative


def silent_units(spread: Tensor, share: float = SILENT) -> Tensor:
    """Units that hardly vary on clean images, (C,) bool: spread below ``share`` of the layer's mean spread.

    A unit that is nearly dead on clean images can move hundreds of its standard deviations (892 were seen) and mean
    nothing by it.
    """
    return spread < share * spread.mean()


def signed_unit_sensitivity(obs: Observation, layer: str, silent: float = 0.0) -> tuple[Tensor, Tensor]:
    """v_k⁺ and v_k⁻, (C,) each: how far the attack raises and how far it lowers a unit; they sum to v_k."""
    change = obs.delta(layer)
    dims = [d for d in range(change.dim()) if d != 1]
    spread = unit_spread(obs, layer)
    rise, fall = ((part.mean(dims) / (spread + EPS)) for part in (change.relu(), (-change).relu()))
    if silent:
        quiet = silent_units(spread, silent)
        return rise.masked_fill(quiet, 0), fall.masked_fill(quiet, 0)
    return rise, fall


@dataclass(frozen=True)
class SensitivityControl:
    """Relative sensitivity of a layer's units beside its control, each (C,), in standard deviations over clean images.

    ``attack`` = ``rise`` + ``fall``; ``noise``: the same under random noise of the attack's own L2 norm, image by image.
    Silent units are 0 throughout.
    """

    attack: Tensor
    rise: Tensor
    fall: Tensor
    noise: Tensor
    silent: Tensor  # bool

    @property
    def attack_sensitive(self) -> Tensor:
        """Units that the attack moves more than noise of equal norm does, (C,) bool: not those that merely vary a lot."""
        return self.attack > self.noise


@torch.no_grad()
def sensitivity_control(
    net: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    layers: Sequence[str],
    *,
    draws: int = 3,
    seed: int = 0,
    silent: float = SILENT,
) -> dict[str, SensitivityControl]:
    """Sensitivity of all named layers to the attack and to noise of equal norm, in eval mode, by layer.

    Args:
        x, x_adv: (N, C, H, W) in [0,1].
        draws: noises to average over; a forward each, beside one clean and one adversarial.
        seed: of the noise, which is drawn from a generator of its own.
        silent: see :func:`relative_unit_sensitivity`.
    """
    generator = torch.Generator().manual_seed(seed)
    with evaluating(net):
        attack = observe(net, x, x_adv, y, layers=layers)
        noise = dict.fromkeys(attack.adv.acts, torch.zeros((), device=x.device))
        for _ in range(draws):
            noisy = observe(net, x, equal_norm_noise(x, x_adv, generator), y, layers=layers, clean=False)
            beside = Observation(y, attack.target, noisy.adv, attack.clean)
            for layer in noise:
                noise[layer] = noise[layer] + relative_unit_sensitivity(beside, layer, silent) / draws
    found = {}
    for layer, control in noise.items():
        rise, fall = signed_unit_sensitivity(attack, layer, silent)
        quiet = silent_units(unit_spread(attack, layer), silent)
        found[layer] = SensitivityControl(rise + fall, rise, fall, control, quiet)
    return found


def equal_norm_noise(x: Tensor, x_adv: Tensor, generator: torch.Generator) -> Tensor:
    """Images x + noise in [0,1] whose distance from x is, image by image, ‖x' − x‖₂ after clipping; (N, C, H, W).

    Gaussian noise; clipping shortens it, so the scale is found by bisection (the clipped norm never falls with the scale).
    An attack so large that noise in [0,1] cannot reach its norm gets the longest there is.

    Args:
        generator: on the CPU, so that every device sees the same noise; or on the images' device, so that none waits.
    """
    noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float64).to(x.device)
    clean = x.double()
    norm = (x_adv.double() - clean).flatten(1).norm(dim=1)

    def clipped(scale: Tensor) -> Tensor:
        return (clean + scale.view(-1, *[1] * (x.dim() - 1)) * noise).clamp(0, 1)

    def too_short(scale: Tensor) -> Tensor:
        return (clipped(scale) - clean).flatten(1).norm(dim=1) < norm

    low = norm / noise.flatten(1).norm(dim=1)  # exact if nothing is clipped
    high = low.clone()
    for _ in range(20):
        high = torch.where(too_short(high), 2 * high, high)
    for _ in range(40):
        middle = (low + high) / 2
        short = too_short(middle)
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return clipped(high).to(x.dtype)


@dataclass(frozen=True)
class StrengthCurves:
    """Units and logits along x + s·(x' − x).

    ``strength`` (S,) from 0 to 1; ``units`` layer name → mean activation over positions, (S, N, C); ``logits`` (S, N, K).
    """

    strength: Tensor
    units: Mapping[str, Tensor]
    logits: Tensor


@torch.no_grad()
def strength_curves(
    net: nn.Module, x: Tensor, x_adv: Tensor, layers: Sequence[str], *, points: int = 11, chunk: int = 128
) -> StrengthCurves:
    """Activation of every unit of the named layers as the perturbation grows from nothing to its whole, in eval mode.

    Args:
        points: strengths, both ends included; points·N samples run, ``chunk`` a forward.

    Raises:
        ValueError: fewer than two points.
    """
    if points < 2:
        raise ValueError(f"points: expected at least 2, found {points}")
    n, logits = len(x), []
    units: dict[str, list[Tensor]] = {}
    layouts = layouts_of(net, x, layers)
    strength = torch.linspace(0, 1, points, device=x.device)
    with evaluating(net):
        for part in strength.split(max(1, chunk // n)):
            images = torch.lerp(x, x_adv, part.view(-1, 1, 1, 1, 1).to(x.dtype))
            with record(net, layers, layouts) as acts:
                logits.append(net(images.flatten(0, 1)).float().unflatten(0, (-1, n)))
            for name, act in acts.items():
                mean = act.float().flatten(2).mean(2) if act.dim() > 2 else act.float()
                units.setdefault(name, []).append(mean.unflatten(0, (-1, n)))
    return StrengthCurves(strength, {name: torch.cat(parts) for name, parts in units.items()}, torch.cat(logits))
