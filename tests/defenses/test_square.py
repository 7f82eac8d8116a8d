"""Square attack: its ball, its budget, what it proposes, and how near it comes to the best there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from glassarmor.defenses import losses
from glassarmor.defenses.attacks.square import Square, bump
from glassarmor.defenses.threat import L2, Linf
from tests.planted import Compressed
from tests.reference.nets import Linear, batch, seeded
from tests.reference.trained import attacked

SHAPE = (2, 4, 4)


def never_fooled(classes: int = 2):
    """A linear net that no attack fools, so that the search spends its whole budget; interior images of class 0."""
    net = Linear(SHAPE, classes)
    with torch.no_grad():
        net.head.bias.copy_(torch.tensor([1000.0] + [0.0] * (classes - 1)))
    x, _, _ = batch(n=6, size=4, channels=2)
    weight = net.head.weight.detach()
    return net, x, torch.zeros(6, dtype=torch.long), weight[1] - weight[0]


def hill(height: int, width: int) -> np.ndarray:
    """Equation 2 of the paper, entry by entry."""
    n = height // 2
    values = np.zeros((height, width))
    for r in range(1, height + 1):
        for s in range(1, width + 1):
            m = n - max(abs(r - height // 2 - 1), abs(s - width // 2 - 1))
            for k in range(m + 1):
                values[r - 1, s - 1] += 1 / (n + 1 - k) ** 2
    return values


@pytest.mark.parametrize("side", [2, 3, 5, 8])
def test_the_bump_is_the_papers(side):
    half = side // 2
    expected = np.concatenate([hill(side, half), -hill(side, side - half)], 1)
    expected /= np.sqrt((expected**2).sum())
    np.testing.assert_allclose(bump(side).numpy(), expected, rtol=1e-12)


def test_the_windows_shrink_as_published():
    linf, l2 = Square(Linf(0.1), queries=10_000), Square(L2(0.5), queries=10_000)
    steps = (1, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)
    expected = [round((0.8 * 0.5**i * 32 * 32) ** 0.5) for i in range(10)]
    assert [linf.side(step, (32, 32)) for step in steps] == expected
    sides = [l2.side(step, (32, 32)) for step in steps]
    assert all(side % 2 == 1 and side >= 3 for side in sides)
    assert sides[0] == 11  # √102.4 = 10.1: the nearest odd number
    assert Square(Linf(0.1), queries=1000).side(2, (32, 32)) == expected[1]  # a shorter budget, the same schedule


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.6)], ids=repr)
def test_it_comes_near_the_best_change_of_a_linear_net(threat):
    net, x, y, direction = never_fooled()
    found, spent = Square(threat, queries=400).search(net, x, y)
    gained = losses.margin(net(found), y) - losses.margin(net(x), y)
    best = threat.eps * (direction.abs().sum() if threat.p > 2 else direction.norm())
    assert (gained <= best * (1 + 1e-3)).all()
    # In L2 the smallest window, 3 × 3, is most of this image; a random direction gains 0.18 of the best.
    assert gained.min() > (0.98 if threat.p > 2 else 0.5) * best
    assert (spent == 400).all()


def test_linf_changes_lie_in_the_corners_of_the_ball():
    """In the interior of the image box every pixel moves by ε exactly."""
    net, x, y, _ = never_fooled()
    found = Square(Linf(0.1), queries=40)(net, x, y)
    torch.testing.assert_close((found - x).abs(), torch.full_like(x, 0.1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("threat", [Linf(0.06), L2(0.8)], ids=repr)
def test_queries_are_counted_and_end_with_success(threat):
    net, x, _, y, _ = attacked(n=24)
    seen = []
    net.register_forward_pre_hook(lambda _net, images: seen.append(len(images[0])))
    found, spent = Square(threat, queries=60).search(net, x, y)
    assert sum(seen) == int(spent.sum())
    wrong = net(x).argmax(1) != y
    fooled = net(found).argmax(1) != y
    assert (spent[wrong] == 1).all()
    assert torch.equal(found[wrong], x[wrong])
    assert (spent[~fooled] == 60).all()
    assert (fooled & ~wrong).any()
    assert int(spent[fooled & ~wrong].min()) < 60


def test_it_climbs():
    net, x, _, y, _ = attacked(n=24)
    short, long = (Square(Linf(0.02), queries=q)(net, x, y) for q in (3, 300))
    clean, few, many = (losses.margin(net(images), y).mean() for images in (x, short, long))
    assert many > few
    assert many > clean


def test_it_needs_no_gradient():
    net, x, _, y, _ = attacked(n=8)
    hidden = Compressed(net)
    found = Square(Linf(0.1), queries=100)(hidden, x, y)
    assert (hidden(found).argmax(1) != y).sum() > (hidden(x).argmax(1) != y).sum()


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 1, 1), (3, 2, 9)])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.2)], ids=repr)
def test_images_of_any_shape(shape, threat):
    x = torch.rand(3, *shape, generator=seeded(2))
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3))
    found = Square(threat, queries=12)(net, x, torch.tensor([0, 1, 2]))
    assert found.shape == x.shape
    assert found.isfinite().all()
    assert (threat.distance(x, found) <= threat.eps + 1e-6).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 2}, "attack.queries: expected a whole number >= 3, found 2"),
        ({"share": 0.0}, r"attack.share: expected null or a share in \(0, 1\], found 0.0"),
        ({"threat": None}, "attack.threat: the Square attack knows L∞ and L2, found None"),
    ],
)
def test_options_that_make_no_attack(options, message):
    with pytest.raises(ValueError, match=message):
        Square(**{"threat": Linf(0.1)} | options)
