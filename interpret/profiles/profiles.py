"""Activation Profiles: where, layer by layer, an image stands between two classes (following the idea of 2103.10229).

The evidence axis, class perception, the turning layer and the measure of coverage are ours: they give the vertical axis
of a profile a meaning, and say when its background does not represent the images shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from glassarmor.interpret.modes import evaluating
from glassarmor.interpret.network.layouts import layouts_of
from glassarmor.interpret.observation import Observation, record
from glassarmor.interpret.profiles.background import (
    Background,
    class_members,
    class_perception,
    class_spacing,
    pooled,
    relative_distance,
)

__all__ = [
    "QUANTILES",
    "ActivationProfiles",
    "Comparison",
    "activation_profiles",
    "compare",
    "coverage_warnings",
    "evidence_position",
    "pooled",
    "strength_positions",
    "turning_layer",
]

EPS = 1e-12
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
LOW_COVERAGE: Final = 0.8  # below this share of covered examples the background is warned about
KRYLOV: Final = 16


def evidence_position(features: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Place of each sample on the line from the centroid of its true class (0) to that of the target (1), (N,).

    e = ⟨φ − μ_t0, μ_t − μ_t0⟩ / ‖μ_t − μ_t0‖².

    Args:
        features: φ(x), (N, D).
        start, end: μ_t0 and μ_t of each sample, (N, D).
    """
    way = end - start
    return ((features - start) * way).sum(1) / way.square().sum(1).clamp_min(EPS)


def turning_layer(clean: Tensor, adv: Tensor) -> Tensor:
    """First layer from which on the adversarial line stays above ½ while the clean line is below it there, (N,) int64.

    −1 where the adversarial line ends below ½, or the clean line is above ½ at every such layer.

    Args:
        clean, adv: evidence positions by layer in execution order, (L, N).
    """
    above = adv > 0.5
    stays = above.flip(0).cumprod(0).flip(0).bool()  # above here and at every later layer
    turned = stays & (clean < 0.5)
    first = turned.int().argmax(0)
    return torch.where(turned.any(0), first, -1)


@dataclass(frozen=True)
class ActivationProfiles:
    """Lines of N examples through L layers over a background, all without units.

    A position is NaN where the background holds no image of the true or of the target class.
    """

    layers: tuple[str, ...]  # in execution order
    y: Tensor  # (N,) true class t0
    target: Tensor  # (N,) what the attack promotes, t
    clean: Tensor  # (L, N) evidence position of x: 0 at the centroid of t0, 1 at that of t
    adv: Tensor  # (L, N) of x'
    turning: Tensor  # (N,) index into ``layers``; −1: none
    clean_second: Tensor  # (L, N) along the main variation across the axis, in the background's standard deviations
    adv_second: Tensor  # (L, N)
    clean_perception: Tensor  # (L, N, 2) share of the nearest background images that are of t0, of t
    adv_perception: Tensor  # (L, N, 2)
    clean_distance: Tensor  # (L, N) from the background of t0, over its own spacing: above 1 it does not cover x
    adv_distance: Tensor  # (L, N) from the background of t0 or t, whichever is nearer
    divergence: Tensor  # (L, N) ‖A(x') − A(x)‖ / ‖A(x)‖
    unit_divergence: Mapping[str, Tensor]  # layer → (C,): its mean square over units is that of ``divergence`` over examples
    pairs: Tensor  # (P, 2) the pairs (t0, t) that occur
    pair: Tensor  # (N,) index into ``pairs``
    bands: Tensor  # (L, P, 2, Q) QUANTILES of the background images of t0, and of t, on the axis of the pair
    counts: Tensor  # (classes,) background images

    @property
    def coverage(self) -> Tensor:
        """Share of the examples that the background covers, (L,); 0.95 and more if they come from where it does."""
        return (self.clean_distance <= 1).float().mean(1)

    @property
    def turning_shares(self) -> Tensor:
        """Share of examples that turn at each layer, and of those that don't turn, (L + 1,)."""
        where = torch.where(self.turning < 0, len(self.layers), self.turning)
        return torch.bincount(where, minlength=len(self.layers) + 1) / len(where)

    @property
    def median_path(self) -> Tensor:
        """The fingerprint of t0 and of t on each pair's axis, (L, P, 2)."""
        return self.bands[..., QUANTILES.index(0.5)]

    @property
    def spread(self) -> Tensor:
        """Distance of the quartiles around :attr:`median_path`, (L, P, 2)."""
        return self.bands[..., QUANTILES.index(0.75)] - self.bands[..., QUANTILES.index(0.25)]


@torch.no_grad()
def activation_profiles(obs: Observation, background: Background, neighbours: int = 10) -> ActivationProfiles:
    """Profiles of the observed examples at the background's layers; no forward pass, the same numbers every time.

    Args:
        obs: both passes, in eval mode, with the background's layers among those observed.
        background: of the same network, from :func:`.background_features`.
        neighbours: k of class perception.

    Raises:
        ValueError: a layer that was not observed, or k outside 1..M.
    """
    if missing := [layer for layer in background.features if layer not in obs.adv.acts]:
        raise ValueError(f"layers: {', '.join(missing)} are in the background, but were not observed")
    layers = tuple(layer for layer in obs.adv.acts if layer in background.features)
    classes = max(obs.adv.logits.shape[1], int(background.labels.max()) + 1)
    pairs, pair = torch.stack([obs.y, obs.target], 1).unique(dim=0, return_inverse=True)
    rows: list[tuple[Tensor, ...]] = []
    units = {}
    for layer in layers:
        sides = [background.phi(obs.side(side).acts[layer]) for side in ("clean", "adv")]
        divergence, units[layer] = _divergence(obs, layer)
        placed = _layer(background.features[layer], background.labels, sides, obs, pairs, pair, classes, neighbours)
        rows.append((*placed, divergence))
    clean, adv, clean2, adv2, clean_near, adv_near, clean_far, adv_far, bands, divergence = map(
        torch.stack, zip(*rows, strict=True)
    )
    return ActivationProfiles(
        layers=layers,
        y=obs.y,
        target=obs.target,
        clean=clean,
        adv=adv,
        turning=turning_layer(clean, adv),
        clean_second=clean2,
        adv_second=adv2,
        clean_perception=clean_near,
        adv_perception=adv_near,
        clean_distance=clean_far,
        adv_distance=adv_far,
        divergence=divergence,
        unit_divergence=units,
        pairs=pairs,
        pair=pair,
        bands=bands,
        counts=background.counts(classes),
    )


def centroids(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of each class, (classes, D); NaN for a class without images."""
    members = torch.nn.functional.one_hot(labels, classes).to(features.dtype)
    return members.T @ features / members.sum(0)[:, None]


def _layer(
    features: Tensor,
    labels: Tensor,
    sides: Sequence[Tensor],
    obs: Observation,
    pairs: Tensor,
    pair: Tensor,
    classes: int,
    neighbours: int,
) -> tuple[Tensor, ...]:
    """One layer of the profile: what :class:`ActivationProfiles` holds by layer, in its order, without divergence."""
    mean = features.mean(0)
    features = features - mean  # distances and positions do not change, their rounding gets less
    sides = [side - mean for side in sides]
    centre = centroids(features, labels, classes)
    start, end = centre[pairs[:, 0]], centre[pairs[:, 1]]  # (P, D)
    position = [evidence_position(side, start[pair], end[pair]) for side in sides]
    across = second_axis(features, end - start)
    scale = (features @ across.T).std(0, correction=0).clamp_min(EPS)
    second = [(side * across[pair]).sum(1) / scale[pair] for side in sides]

    distances = torch.cdist(torch.cat(sides), features).split(len(obs.y))
    near = [torch.stack([class_perception(d, labels, c, neighbours) for c in (obs.y, obs.target)], 1) for d in distances]
    spacing = class_spacing(features, labels, classes)
    of_true, *of_either = (
        relative_distance(d, labels, spacing, c)
        for d, c in ((distances[0], obs.y), (distances[1], obs.y), (distances[1], obs.target))
    )
    bands = _bands(features, labels, classes, pairs, start, end)
    return (*position, *second, *near, of_true, torch.minimum(*of_either), bands)


def second_axis(features: Tensor, axes: Tensor) -> Tensor:
    """For each axis the first principal component of the features at right angles to it, (P, D), of length 1.

    By Lanczos iteration over all axes at once, in ``KRYLOV`` steps: the direction of most variation is what it finds
    first.  Its sign makes the largest component positive.

    Args:
        features: centred, (M, D).
        axes: (P, D), of any length; NaN gives NaN.
    """
    unknown = axes.isnan().any(1, keepdim=True)
    axes = torch.nn.functional.normalize(axes.nan_to_num(), dim=1)
    small = features.shape[1] <= len(features)
    covariance = features.T @ features if small else None

    def across(v: Tensor) -> Tensor:
        return v - (v * axes).sum(1, keepdim=True) * axes

    def spread(v: Tensor) -> Tensor:
        return across(v @ covariance if covariance is not None else (v @ features.T) @ features)

    mixture = torch.randn(len(features), generator=torch.Generator().manual_seed(0)).to(features)
    v = across((mixture @ features).expand_as(axes))
    steps = min(KRYLOV, features.shape[1])
    basis, images = (features.new_zeros(len(axes), steps, features.shape[1]) for _ in range(2))
    for k in range(steps):
        basis[:, k] = torch.nn.functional.normalize(v, dim=1)
        images[:, k] = v = spread(basis[:, k])
        done = basis[:, : k + 1]
        for _ in range(2):  # once leaves rounding behind
            v = across(v - ((done @ v[..., None]).mT @ done)[:, 0])
        # All directions are found when nothing but rounding is left: a unit vector of it would be no direction.
        v = v.masked_fill(v.norm(dim=1, keepdim=True) < 1e-5 * images[:, 0].norm(dim=1, keepdim=True), 0)
    small_matrix = basis @ images.mT
    main = torch.linalg.eigh((small_matrix + small_matrix.mT) / 2).eigenvectors[..., -1:]
    found = torch.nn.functional.normalize(across((main.mT @ basis)[:, 0]), dim=1)
    sign = found.gather(1, found.abs().argmax(1, keepdim=True)).sign()
    return torch.where(unknown, torch.nan, found * sign)


def _bands(features: Tensor, labels: Tensor, classes: int, pairs: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Quantiles of the background's positions on the axis of each pair, (P, 2, Q): images of t0, and of t."""
    way = end - start
    positions = (way @ features.T - (way * start).sum(1, keepdim=True)) / way.square().sum(1, keepdim=True).clamp_min(EPS)
    members, real = (part[pairs] for part in class_members(labels, classes))  # (P, 2, most)
    values = positions.gather(1, members.flatten(1)).view(members.shape).masked_fill(~real, torch.nan)
    levels = torch.tensor(QUANTILES, device=features.device)
    return torch.nanquantile(values, levels, dim=2).movedim(0, 2)


def _divergence(obs: Observation, layer: str) -> tuple[Tensor, Tensor]:
    """‖ΔA‖ / ‖A(x)‖ of each example, (N,), and what each unit has in it, (C,)."""
    change, clean = obs.delta(layer).detach(), obs.clean.acts[layer].detach().float()
    units = change.flatten(1 if change.dim() < 3 else 2).square()
    units = units.sum(2) if change.dim() > 2 else units  # (N, C)
    share = units / clean.flatten(1).square().sum(1, keepdim=True).clamp_min(EPS)
    return share.sum(1).sqrt(), (share.mean(0) * share.shape[1]).sqrt()


def strength_positions(
    net: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    target: Tensor,
    background: Background,
    *,
    points: int = 11,
    chunk: int = 128,
) -> Tensor:
    """Evidence positions along x + s·(x' − x), s from 0 to 1, (points, L, N), in eval mode; the net is left as it was.

    Args:
        y, target: the classes between which each example moves, (N,).
        points: strengths, both ends included; points·N samples run, ``chunk`` a forward.

    Raises:
        ValueError: fewer than two points.
    """
    if points < 2:
        raise ValueError(f"points: expected at least 2, found {points}")
    n, layers = len(x), tuple(background.features)
    layouts = layouts_of(net, x, layers)
    classes = 1 + int(torch.stack([y.max(), target.max(), background.labels.max()]).max())
    centre = {layer: centroids(phi, background.labels, classes) for layer, phi in background.features.items()}
    found = []
    with torch.inference_mode(False), torch.no_grad(), evaluating(net):  # as in background_features
        for part in torch.linspace(0, 1, points, device=x.device).split(max(1, chunk // n)):
            images = torch.lerp(x, x_adv, part.view(-1, 1, 1, 1, 1).to(x.dtype))
            with record(net, layers, layouts) as acts:
                net(images.flatten(0, 1))
            start, end = y.repeat(len(part)), target.repeat(len(part))
            lines = [
                evidence_position(background.phi(act), centre[layer][start], centre[layer][end])
                for layer, act in acts.items()
            ]
            found.append(torch.stack(lines).unflatten(1, (-1, n)).transpose(0, 1))
    return torch.cat(found)


def coverage_warnings(profiles: ActivationProfiles, class_names: Sequence[str] | None = None) -> tuple[str, ...]:
    """What a reader must know of the background before trusting the lines; empty if there is nothing.

    One sentence if a class of the examples has fewer than two background images; one if at some layer fewer than
    ``LOW_COVERAGE`` of the other examples are covered, naming the worst layer.
    """
    names = class_names or tuple(f"class {i}" for i in range(len(profiles.counts)))
    needed = torch.cat([profiles.y, profiles.target]).unique()
    lacking = needed[profiles.counts[needed] < 2]
    warnings = []
    if len(lacking):
        listed = ", ".join(names[i] for i in lacking.tolist())
        warnings.append(
            f"The background holds fewer than two images of {listed}: lines towards or from there mean nothing. "
            "Add training images of it."
        )
    judged = (profiles.y[:, None] != lacking).all(1)
    if judged.any():
        share = (profiles.clean_distance[:, judged] <= 1).float().mean(1)
        worst = int(share.argmin())
        if share[worst] < LOW_COVERAGE:
            size, percent = int(profiles.counts.sum()), 100 * float(share[worst])
            warnings.append(
                f"At layer {profiles.layers[worst]} the background of {size} images covers {percent:.0f} % "
                "of the examples (95 % are usual): their lines may show that they are unusual, not what the attack does. "
                "Choose a larger background, or one from the same source."
            )
    return tuple(warnings)


@dataclass(frozen=True)
class Comparison:
    """Two profiles of the same examples on one axis: two networks, or two epochs; the first index is 0 for a, 1 for b.

    ``depth`` (G,) from 0, the first layer, to 1, the last; ``clean``, ``adv`` (2, G, N) evidence positions there;
    ``turning`` (2, N) depth of the turning layer, NaN where there is none.
    """

    depth: Tensor
    clean: Tensor
    adv: Tensor
    turning: Tensor

    @property
    def difference(self) -> Tensor:
        """Adversarial position in b − in a, (G, N): negative where b keeps the example nearer to its class."""
        return self.adv[1] - self.adv[0]

    @property
    def later(self) -> Tensor:
        """How much deeper the example turns in b than in a, (N,); NaN unless it turns in both."""
        return self.turning[1] - self.turning[0]

    @property
    def turned(self) -> dict[str, int]:
        """How many examples turn in both, in a or b alone, in neither."""
        a, b = ~self.turning.isnan()
        counts = {"both": a & b, "a": a & ~b, "b": b & ~a, "neither": ~a & ~b}
        return {name: int(count.sum()) for name, count in counts.items()}


def compare(a: ActivationProfiles, b: ActivationProfiles) -> Comparison:
    """Pair the profiles of the same examples, each with the target of its own attack.

    Positions have no units, so they compare as they are.  Layers of equal number are taken to correspond; otherwise
    positions are interpolated linearly at the depths of the longer one.

    Raises:
        ValueError: other examples, as far as their classes tell.
    """
    if not torch.equal(a.y, b.y):
        found = f"{a.y.tolist()} and {b.y.tolist()}"
        raise ValueError(f"compare: expected examples of the same classes on both sides, found {found}")
    count = max(len(a.layers), len(b.layers))
    depth = torch.linspace(0, 1, count, device=a.y.device)
    turning = [torch.where(p.turning < 0, torch.nan, p.turning / max(1, len(p.layers) - 1)).to(depth.dtype) for p in (a, b)]
    return Comparison(
        depth=depth,
        clean=torch.stack([_at_depths(p.clean, count) for p in (a, b)]),
        adv=torch.stack([_at_depths(p.adv, count) for p in (a, b)]),
        turning=torch.stack(turning),
    )


def _at_depths(lines: Tensor, count: int) -> Tensor:
    """(L, N) → (count, N)."""
    if len(lines) == count:
        return lines
    if len(lines) == 1:
        return lines.expand(count, -1)
    return torch.nn.functional.interpolate(lines.T[None], size=count, mode="linear", align_corners=True)[0].T
