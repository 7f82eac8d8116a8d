"""Is the gradient that a network hands an attacker the slope of what it computes, and does that not jump?  (ours)"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glassarmor.defenses.losses import cross_entropy
from glassarmor.interpret.modes import undisturbed

INTERIOR: Final = 0.005  # distance kept from 0 and 1, where a net that clamps its input has a kink
PARTS, HALVINGS = 8, 12  # of a way, in the search for jumps
STEP: Final = {torch.float64: 1e-5, torch.float32: 1e-3}  # of every pixel: far above rounding, far below most kinks
COARSE: Final = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # the largest relative error of their rounding
ULPS, POINTS = 8, 16  # step of the difference for a net that rounds so, in these errors


class Reachable(nn.Module):
    """``net``, with a gradient for every input: zero where it has none, or none that is finite; and scores in floats.

    So that an attack on a net that cuts its gradients runs, and fails, instead of raising.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            logits: Tensor = self.net(x)
            return logits if logits.is_floating_point() else logits.float()
        inside = x * 1  # not the leaf itself: it takes the hook, and a net may change its input in place
        inside.register_hook(torch.nan_to_num)
        try:
            logits = self.net(inside)
        except RuntimeError as error:
            if "requires grad" not in str(error):
                raise
            logits = self.net(x.detach())  # numpy takes no tensor that asks for a gradient
        return logits + 0 * x.flatten(1).sum(1, keepdim=True)


def has_gradient(net: nn.Module, x: Tensor, chunk: int = 16) -> bool:
    """Whether a finite gradient other than zero comes from the logits of any of these images (N, C, H, W) to a pixel.

    Of the logits mixed at random, for each image otherwise, so that neither a loss that saturates nor logits that sum to
    zero over a batch hide anything.  Images are asked ``chunk`` at a time until one has a gradient.  False for a forward
    that leaves autograd (no_grad, detach, numpy, whole numbers) and for one of steps alone (sign, argmax, round).
    """
    device = next((tensor.device for tensor in (*net.parameters(), *net.buffers())), x.device)
    return any(_moved(net, part.to(device)) for part in x.detach().split(chunk))


def _moved(net: nn.Module, x: Tensor) -> bool:
    with undisturbed(net):
        images = x.clone().requires_grad_()
        logits = Reachable(net)(images)
        mixture = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        mixed = (logits * mixture).sum(1)
        (gradient,) = torch.autograd.grad(torch.where(mixed.isfinite(), mixed, 0).sum(), images)
    return bool(((gradient != 0) & gradient.isfinite()).any())


def zero_gradients(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: no pixel of this image (N, C, H, W) has a finite gradient of the cross-entropy other than zero."""
    with undisturbed(net):
        images = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(Reachable(net)(images), y).sum(), images)
    return ~(gradient.flatten(1) != 0).any(1)


def gradient_error(net: nn.Module, x: Tensor, y: Tensor, directions: int = 4, seed: int = 0) -> Tensor:
    """Share of the true slope that the reported gradient g misses, (N,): 0 if it is right, 1 if it reports nothing.

    Σ (f′_v − g·v)² / (Σ f′_v² + Σ (g·v)²), f = Z_t − Z_y with the strongest wrong class t, f′_v the central difference
    along v.  Once for v = sign g, where an attack goes, and once summed over random signs; the larger counts.  In float64
    where the net can be copied so, so that neither rounding nor kinks weigh.  A net that rounds inside (:func:`rounding`)
    takes steps far above its rounding, and is averaged over points around each image.

    Args:
        x: images in [0,1], (N, C, H, W); small noise is added, so that no neighbours are equal for being grey levels, black
            or white, and 0.005 is kept from 0 and 1 after it.
        y: true labels (N,).
    """
    net, dtype, step = _sharp(net, x)
    inside = INTERIOR
    if step > STEP[torch.float32]:  # that of a net that rounds
        net, inside = Smoothed(net, step), 2 * step
    generator = torch.Generator(x.device).manual_seed(seed)
    noise = torch.rand(x.shape, generator=generator, device=x.device) - 0.5
    # Noise last: clamped after it, black and white areas would be flat again, where max-pooling and medians have kinks.
    room = inside + INTERIOR
    points = (x.detach().clamp(room, 1 - room) + 2 * INTERIOR * noise).to(dtype)
    with undisturbed(net):
        reachable = Reachable(net)
        points.requires_grad_()
        logits = reachable(points)
        rival = logits.scatter(1, y[:, None], -torch.inf).argmax(1)

        def lead(logits: Tensor) -> Tensor:
            return (logits.gather(1, rival[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

        (gradient,) = torch.autograd.grad(lead(logits).sum(), points)
        points = points.detach()

        def slopes(v: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                ahead, behind = (lead(reachable(points + sign * step * v)) for sign in (1, -1))
            return (ahead - behind) / (2 * step), (gradient * v).flatten(1).sum(1)

        random = [torch.randint(2, x.shape, generator=generator, device=x.device) * 2 - 1 for _ in range(directions)]
        along = _missed([slopes(gradient.sign())])
        return torch.maximum(along, _missed([slopes(signs.to(dtype)) for signs in random])).float()


def largest_jump(net: nn.Module, x: Tensor, ends: Tensor) -> Tensor:
    """The largest jump of a logit on the way from x to ``ends``, (N,), in the logits' units; next to 0 for a continuous net.

    Each way is cut into 8 parts.  Of each part the half whose ends differ more is kept, 12 times: what then still differs,
    over 1/32768 of the way, is a jump, which no gradient tells of (as in k-winners-take-all, Xiao et al. 2020,
    1905.10510).  In float64 where the net can be copied so.

    Args:
        x, ends: images in [0,1], (N, C, H, W).
    """
    net, dtype, _ = _sharp(net, x)
    start, way = x.detach().to(dtype), (ends - x).detach().to(dtype)
    net = Reachable(net)
    with undisturbed(net), torch.no_grad():

        def logits(t: Tensor) -> Tensor:
            """At the fractions t (P, N) of the way, (P, N, K)."""
            return torch.stack([net(start + part.view(-1, 1, 1, 1) * way) for part in t])

        grid = torch.linspace(0, 1, PARTS + 1, dtype=dtype, device=x.device)[:, None].expand(-1, len(x))
        left, right = grid[:-1], grid[1:]
        values = logits(grid)
        low, high = values[:-1], values[1:]
        for _ in range(HALVINGS):
            middle = (left + right) / 2
            value = logits(middle)
            first = (value - low).abs().amax(2) > (high - value).abs().amax(2)
            left, right = torch.where(first, left, middle), torch.where(first, middle, right)
            low, high = torch.where(first[..., None], low, value), torch.where(first[..., None], value, high)
    return (high - low).abs().amax((0, 2)).float()


def _missed(slopes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    true, reported = (torch.stack(values) for values in zip(*slopes, strict=True))
    whole = (true.square() + reported.square()).sum(0)
    return (true - reported).square().sum(0) / torch.where(whole > 0, whole, 1)


class Smoothed(nn.Module):
    """The mean of ``net`` over 16 points around each image, at most ``radius`` a pixel apart: roundings average out."""

    def __init__(self, net: nn.Module, radius: float) -> None:
        super().__init__()
        self.net, self.radius = net, radius

    def forward(self, x: Tensor) -> Tensor:
        draw = torch.Generator(x.device).manual_seed(0)
        moved = (torch.rand(x.shape[1:], generator=draw, device=x.device) * 2 - 1 for _ in range(POINTS))
        return torch.stack([self.net(x + self.radius * move).float() for move in moved]).mean(0)


class _Kinds(TorchDispatchMode):
    """Notes the types of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


def rounding(net: nn.Module, x: Tensor) -> float:
    """The largest relative error of a rounding inside the forward: 2⁻⁸ for bfloat16, 2⁻¹¹ for float16; 0 without either.

    Seen by the types of all results, under an autocast of the net's own too, which none outside can switch off.
    """
    with undisturbed(net), torch.no_grad(), _Kinds() as kinds:
        Reachable(net)(x.detach())
    return max((COARSE.get(kind, 0.0) for kind in kinds.seen), default=0.0)


def _sharp(net: nn.Module, x: Tensor) -> tuple[nn.Module, torch.dtype, float]:
    """The net in float64 if it computes the same there, else as it is; and the step of its differences."""
    few = x[:2].detach()
    if unit := rounding(net, few):
        return net, torch.float32, ULPS * unit
    try:
        twin = copy.deepcopy(net).double()
        with undisturbed(net), undisturbed(twin), torch.no_grad():
            plain, sharp = net(few), twin(few.double())
        if sharp.dtype == torch.float64 and torch.allclose(plain.double(), sharp, rtol=1e-2, atol=1e-2):
            return twin, torch.float64, STEP[torch.float64]
    except Exception:  # whatever a foreign net raises here: it was not made for float64, or not for copying
        pass
    return net, torch.float32, STEP[torch.float32]


@dataclass
class _Watch(TorchFunctionMode):
    """Notes who calls autograd, and who cuts a tensor that depends on the images out of the graph."""

    calls: set[str] = field(default_factory=set)
    cuts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
                self.cuts.add("data")
            elif name in ("detach", "detach_", "numpy"):
                self.cuts.add(name)
            elif not torch.is_grad_enabled() and not name.startswith("__"):
                self.cuts.add("no_grad")
        if name in ("grad", "backward", "requires_grad_"):
            self.calls.add(name)
        return func(*args, **(kwargs or {}))


def watched(net: nn.Module, x: Tensor) -> tuple[list[str], list[str]]:
    """What one forward of ``net`` does to the graph: calls of autograd, and cuts of what depends on the images; by name."""
    with undisturbed(net):
        images = x.detach().clone().requires_grad_() * 1
        with _Watch() as watch:
            Reachable(net)(images)
    return sorted(watch.calls), sorted(watch.cuts)
