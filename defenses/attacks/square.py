"""Square attack (Andriushchenko et al. 2020, 1912.00049): random search that asks for logits only, never for a gradient."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.draws import Seeded
from glassarmor.defenses.losses import margin
from glassarmor.defenses.options import require_number, require_whole
from glassarmor.defenses.threat import L2, Linf, Threat, norms, per_sample
from glassarmor.interpret.inputs import borrowed
from glassarmor.interpret.modes import as_module

HALVED: Final = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10,000 after which the area is halved
SHARES: Final = {Linf: 0.8, L2: 0.1}  # p of the paper's experiments


class Square(Seeded):
    """Random search over square windows that raises the margin max_{c≠y} Z_c − Z_y (1912.00049, algorithms 1 to 3).

    L∞: a window of all channels is set to ± ε, a sign a channel.  L2: a window gets the length of two windows and what the
    ball has left, with a bump of either sign added to its direction; the other window goes back to the clean image.  All
    samples search at once, each in windows of its own; one that is misclassified asks no more.

    Args:
        threat: L∞ or L2.
        queries: forwards a sample at most; the first of the clean image, the second of the stripes (tiles, in L2) it begins
            from.
        share: p, the share of the image that the first windows cover, halved as the queries go by; by default 0.8 in L∞ and
            0.1 in L2, as published.
        seed: of the attack's own generator, as in :class:`.PGD`.

    Raises:
        ValueError: another ball, fewer than 3 queries, or a share outside (0, 1].
    """

    def __init__(self, threat: Threat, queries: int = 1000, share: float | None = None, seed: int = 0) -> None:
        if not isinstance(threat, Linf | L2):
            raise ValueError(f"attack.threat: the Square attack knows L∞ and L2, found {threat!r}")
        require_whole("attack.queries", queries, 3)
        require_number("attack.share", share, "(0, 1]", null=True)
        self.threat: Threat = threat
        self.queries = queries
        self.share = SHARES[type(threat)] if share is None else share
        self.seed = seed
        self.calls = 0

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The best images found, (N, C, H, W), fp32, detached, in the ball; the clean ones where they were wrong already."""
        return self.search(net, x, y)[0]

    def search(self, net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The images as above, and the queries that each of them took, (N,).

        Args:
            net: run in eval mode and without gradients; modes, flags, buffers and gradients are put back.
            x: images in [0,1], (N, C, H, W).
            y: true labels (N,).
        """
        net = as_module(net)
        with borrowed(net, x, y) as (x, y), torch.no_grad():
            generator = self.generator(x.device)
            best = x.clone()
            score = margin(net(x), y)
            spent = torch.ones_like(y)
            begin = self.threat.project(x, x + self._start(x, generator))
            for query in range(1, self.queries):
                standing = (score <= 0).nonzero().flatten()
                if len(standing) == 0:
                    break
                if query == 1:
                    images = begin[standing]
                else:
                    side = self.side(query - 1, (x.shape[2], x.shape[3]))
                    change = self._change(best[standing] - x[standing], side, generator)
                    images = self.threat.project(x[standing], x[standing] + change)
                found = margin(net(images), y[standing])
                spent[standing] += 1
                better = found > score[standing] if query > 1 else torch.ones_like(found, dtype=torch.bool)
                best[standing[better]] = images[better]
                score[standing[better]] = found[better]
        return best, spent

    def side(self, step: int, size: tuple[int, int]) -> int:
        """Side of the windows of this step: of p·H·W pixels, p halved along the budget; odd and at least 3 in L2."""
        halvings = sum(step / self.queries * 10_000 > bound for bound in HALVED)
        side = (self.share * 0.5**halvings * size[0] * size[1]) ** 0.5
        if isinstance(self.threat, L2):
            return max(1, min(max(3, 2 * round((side - 1) / 2) + 1), *size))
        return max(1, min(round(side), *size))

    def _start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n, channels, height, width = x.shape
        if isinstance(self.threat, Linf):
            return self.threat.eps * _signs((n, channels, 1, width), x, generator).expand_as(x)
        tile = max(1, min(max(3, min(height, width) // 5), height, width))
        rows, columns = -(-height // tile), -(-width // tile)
        cells = _signs((n, channels, rows, columns), x, generator)
        cells = cells.repeat_interleave(tile, 2).repeat_interleave(tile, 3)
        change = (cells * bump(tile).to(x).repeat(rows, columns))[..., :height, :width]
        return change * per_sample(self.threat.eps / norms(change, 2), x)

    def _change(self, change: Tensor, side: int, generator: torch.Generator) -> Tensor:
        """The next x' − x to try, before it is projected."""
        window = _window(change, side, generator)
        signs = _signs((*change.shape[:2], 1, 1), change, generator)
        new = change.clone()
        if isinstance(self.threat, Linf):
            new[window] = (self.threat.eps * signs).expand(-1, -1, side, side)
            return new
        other = _window(change, side, generator)
        both = torch.zeros_like(change, dtype=torch.bool)
        both[window] = both[other] = True
        unused = (self.threat.eps**2 - change.square().sum((1, 2, 3))).clamp_min(0) / change.shape[1]
        length = ((change.square() * both).sum((2, 3)) + unused[:, None]).sqrt()[..., None, None]
        turned = torch.rand(len(change), 1, 1, 1, generator=generator, device=change.device) < 0.5
        tile = bump(side).to(change)
        direction = signs * torch.where(turned, tile.T, tile) + _unit(change[window])
        new[other] = 0
        new[window] = _unit(direction) * length
        return new


def bump(side: int) -> Tensor:
    """η of 1912.00049, equation 2, of unit length: two halves of opposite sign, each highest at its middle; (side, side)."""
    half = max(1, side // 2)
    parts = [_hill(side, width) for width in (half, side - half) if width]
    parts[-1] = parts[-1] if len(parts) == 1 else -parts[-1]
    return _unit(torch.cat(parts, 1)[None, None])[0, 0]


def _hill(height: int, width: int) -> Tensor:
    """Sums of 1/(n + 1 − k)² for k = 0 … M, M the distance from the border, (height, width)."""
    n = height // 2
    levels = (1 / torch.arange(n + 1, 0, -1).double().square()).cumsum(0)
    r, s = (torch.arange(1, size + 1) for size in (height, width))
    away = torch.maximum((r - height // 2 - 1).abs()[:, None], (s - width // 2 - 1).abs()[None])
    return torch.where(away <= n, levels[(n - away).clamp_min(0)], 0.0)


def _unit(windows: Tensor) -> Tensor:
    """Each channel of each sample scaled to length 1; zero stays zero."""
    length = windows.square().sum((-2, -1), keepdim=True).sqrt()
    return windows / torch.where(length > 0, length, 1)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator, device=like.device).to(like) * 2 - 1


def _window(like: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Index of a square a sample, at a place of its own: ``like[index]`` is (N, C, side, side)."""
    n, channels, height, width = like.shape
    device = like.device
    top = torch.randint(height - side + 1, (n, 1, 1, 1), generator=generator, device=device)
    left = torch.randint(width - side + 1, (n, 1, 1, 1), generator=generator, device=device)
    reach = torch.arange(side, device=device)
    samples = torch.arange(n, device=device)[:, None, None, None]
    return samples, torch.arange(channels, device=device)[:, None, None], top + reach[:, None], left + reach
