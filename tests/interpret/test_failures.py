"""The panel of failures: groups by class pair, and the numbers of the signals, on a linear net with a closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glassarmor.interpret.observation import observe
from glassarmor.interpret.views.charts import Maps, Table
from glassarmor.interpret.views.panels.failures import FailuresPanel, fallen_pairs
from glassarmor.interpret.views.view import Probe

NAMES = ("cat", "dog", "owl")
PIXELS = torch.tensor(  # one image of class 0, two of 1, one that is answered wrongly when clean
    [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.8, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.9, 0.0, 0.0, 0.0]]
)
ATTACKED = torch.tensor(
    [[0.2, 0.5, 0.0, 0.0], [0.3, 0.2, 0.0, 0.0], [0.6, 0.1, 0.0, 0.0], [0.0, 0.9, 0.5, 0.0], [0.8, 0.0, 0.0, 0.0]]
)
LABELS = torch.tensor([0, 1, 1, 0, 0])


def linear_net() -> nn.Module:
    """The logit of class c is pixel c."""
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        net[2].weight.copy_(torch.eye(3, 4))
    return net.eval()


def probe_of(x: Tensor, x_adv: Tensor, training: tuple[Tensor, Tensor] | None = None) -> Probe:
    net = linear_net()
    obs = observe(net, x.view(-1, 1, 2, 2), x_adv.view(-1, 1, 2, 2), LABELS, layers=["1"])
    return Probe(net, obs, ("1",), tuple(f"test-{i}" for i in range(len(x))), NAMES, {}, training)


def test_only_what_was_right_and_fell_is_grouped_the_largest_pair_first() -> None:
    pairs = fallen_pairs(probe_of(PIXELS, ATTACKED))
    assert [(pair.true, pair.became, pair.members.tolist()) for pair in pairs] == [(1, 0, [1, 2]), (0, 1, [0])]


def test_table_and_maps_hold_the_closed_form() -> None:
    """Linear logits: p_i = (w_t)_i δ_i and s_i = −(w_t0)_i δ_i, region by region."""
    view = FailuresPanel(grid=(2, 2))(probe_of(PIXELS, ATTACKED))
    table = next(chart for chart in view.charts if isinstance(chart, Table))
    first = dict(zip(table.columns, table.rows[0], strict=True))
    assert first["true → became"] == "dog → cat"
    assert first["Σ promotion (logits)"] == pytest.approx((0.3 + 0.6) / 2, abs=1e-4)
    assert first["Σ suppression (logits)"] == pytest.approx((0.8 + 0.7) / 2, abs=1e-4)
    assert first["regions by suppression"] == first["by promotion"] == 0.5  # one pixel of each kind an image
    maps = next(chart for chart in view.charts if isinstance(chart, Maps))
    promotion = next(column.values for column in maps.columns if column.title.startswith("Promotion"))
    np.testing.assert_allclose(promotion[0], [[0.45, 0], [0, 0]], atol=1e-6)
    assert view.scalars["failures/fallen"] == 3
    assert view.scalars["failures/largest_pair"] == pytest.approx(2 / 3)
    assert "dog → cat (2)" in view.headline
    assert view.drawing is not None


def test_the_turn_is_named_where_training_images_say_what_a_class_is() -> None:
    """Between the centroids (0.95, 0) and (0, 0.95), (0.3, 0.2) lies at 0.55 of the way from dog to cat: turned."""
    training = torch.eye(4)[[0, 0, 1, 1, 2]].view(-1, 1, 2, 2) * torch.tensor([1, 0.9, 1, 0.9, 1]).view(-1, 1, 1, 1)
    view = FailuresPanel(grid=(2, 2))(probe_of(PIXELS, ATTACKED, (training, torch.tensor([0, 0, 1, 1, 2]))))
    assert view.table is not None
    assert view.table.rows[0][-2:] == ("1", 1.0)
    unknown = FailuresPanel(grid=(2, 2))(probe_of(PIXELS, ATTACKED))
    assert unknown.table is not None
    assert unknown.table.rows[0][-2:] == ("none", 0.0)


def test_nothing_fell() -> None:
    view = FailuresPanel()(probe_of(PIXELS, PIXELS))
    assert view.headline == "No rightly classified image fell."
    assert view.charts == ()


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"panels.failures.pairs: expected a whole number >= 1, found 0"):
        FailuresPanel(pairs=0)
