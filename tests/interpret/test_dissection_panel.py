"""The dissection panel shows what the dissection of the same net says, on concepts of the probe's own size."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from glassarmor.datamodules.concepts import procedural_concepts
from glassarmor.interpret.concepts.association import link
from glassarmor.interpret.concepts.dissection import dissect
from glassarmor.interpret.observation import observe
from glassarmor.interpret.views.charts import Maps, Scatter, Trend
from glassarmor.interpret.views.page.encode import encode
from glassarmor.interpret.views.panels.dissection import DissectionPanel
from glassarmor.interpret.views.view import Probe


@pytest.fixture
def probe() -> Probe:
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()  # fmt: skip
    x = torch.rand(6, 1, 16, 16)
    obs = observe(net, x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1), torch.arange(6) % 4, layers=["1", "3"])
    return Probe(net, obs, ("1", "3"), tuple(f"val-{i}" for i in range(6)), tuple("abcd"), {})


def test_the_panel_says_what_the_dissection_says(probe: Probe) -> None:
    panel = DissectionPanel(partial(procedural_concepts, count=40), cards=4, patches=2)
    view = panel(probe)
    found = dissect(probe.net, procedural_concepts(count=40, size=16, channels=1), ["1", "3"], quantile=0.02, top=2)
    control = probe.sensitivity(3)
    assert view.table is not None
    concepts = {(row[1], row[0]): row[2] for row in view.table.rows}
    for layer, dissection in found.items():
        for unit in range(len(dissection.dead)):
            if not dissection.dead[unit]:
                assert concepts[layer, unit] == dissection.concepts[int(dissection.best_concept[unit])]
        expected = link(dissection, control[layer])["attack"].spearman
        assert view.scalars[f"dissection/spearman/{layer}"] == pytest.approx(expected, nan_ok=True)
    total = sum(int(d.detectors.sum()) for d in found.values())
    assert sum(v for k, v in view.scalars.items() if k.startswith("dissection/detectors/")) == total
    assert view.headline.startswith(f"{total} of 14 units detect a concept")
    scatter = next(c for c in view.charts if isinstance(c, Scatter))
    np.testing.assert_allclose(scatter.x, np.concatenate([d.best_iou.numpy() for d in found.values()]))
    trend = next(c for c in view.charts if isinstance(c, Trend))
    assert len(trend.keys) == len(set(procedural_concepts(count=1, size=16, channels=1).categories))


def test_a_card_outlines_where_the_unit_exceeds_its_threshold(probe: Probe) -> None:
    """A unit that fires on the bright half of its image is outlined along that half, and nowhere else."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        net[0].weight.fill_(1.0)  # type: ignore[union-attr, operator]
        net[0].bias.zero_()  # type: ignore[union-attr, operator]
    image = torch.zeros(1, 1, 16, 16)
    image[..., 8:] = 1.0

    class Halves:
        concepts, categories = ("right",), ("position",)

        def __len__(self) -> int:
            return 1

        def __iter__(self):  # type: ignore[no-untyped-def]
            yield image, (image[:, :, :, :] > 0).long() - 1

    obs = observe(net, image, image.clone(), torch.tensor([0]), layers=["0"])
    one = Probe(net, obs, ("0",), ("val-0",), ("a", "b"), {})
    view = DissectionPanel(lambda size, channels: Halves(), quantile=0.6, patches=1, cards=1)(one)
    card = next(c for c in view.charts if isinstance(c, Maps))
    assert card.row_titles == ("0, unit 0 · detects right · IoU 1.000 (chance 0.333)",)  # half of all pixels each: ¼ / ¾
    picture = card.columns[0].values[0]
    magenta = np.abs(picture - [1.0, 0.0, 0.8]).max(-1) < 1e-6
    assert magenta[:, 8].all()  # the edge of the bright half
    assert not magenta[:, :8].any()
    assert not magenta[2:-2, 10:-2].any()  # the inside is left as it is
    encode(card)


def test_cards_keep_a_colour_scale_of_their_own(probe: Probe) -> None:
    """Another epoch has other best detectors: a row means another unit then."""
    view = DissectionPanel(partial(procedural_concepts, count=20), cards=2, patches=1)(probe)
    assert next(c for c in view.charts if isinstance(c, Maps)).own_scale
