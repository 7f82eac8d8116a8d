"""What every panel keeps, whatever it shows: one row a panel."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from glassarmor.datamodules.concepts import procedural_concepts
from glassarmor.interpret import storage, views
from glassarmor.interpret.observation import observe
from glassarmor.interpret.views import (
    AttributionPanel,
    CAMPanel,
    DissectionPanel,
    FailuresPanel,
    OutcomePanel,
    Probe,
    ProfilesPanel,
    PSEPanel,
    ReportPage,
    RestorationPanel,
    SensitivityPanel,
    Table,
    TrainingPanel,
    UnitsPanel,
    View,
)
from glassarmor.interpret.views.draw import figures
from glassarmor.interpret.views.page.encode import encode
from glassarmor.interpret.views.summary import summarised
from glassarmor.interpret.views.view import Panel
from tests.composing import CONFIGS, options
from tests.reference.nets import unchanged
from tests.reference.trained import attacked, images

HOSTILE = "</script><script>document.title='owned'</script>"
PANELS: dict[str, Callable[[], Panel]] = {
    "attribution": lambda: AttributionPanel(method="input_x_gradient", images=3),
    "cam": lambda: CAMPanel(images=3),
    "dissection": lambda: DissectionPanel(partial(procedural_concepts, count=40)),
    "failures": FailuresPanel,
    "outcome": OutcomePanel,
    "profiles": lambda: ProfilesPanel(per_class=2, points=2),
    "pse": lambda: PSEPanel(grid=(4, 4), images=3),
    "restoration": lambda: RestorationPanel(grid=(4, 4), draws=2),
    "sensitivity": lambda: SensitivityPanel(draws=2, points=3),
    "training": TrainingPanel,
    "units": lambda: UnitsPanel(top=3),
}
WITHOUT_PICTURE = ("training",)  # W&B draws the scalars itself
each = pytest.mark.parametrize("name", PANELS)


@pytest.fixture
def probe() -> Probe:
    """Images and a net that learned them; the attack turns some; a class has a hostile name."""
    net, x, x_adv, y, _ = attacked(n=8, eps=0.1)
    with torch.no_grad():
        assert 0 < int((net(x_adv).argmax(1) != y)[net(x).argmax(1) == y].sum()) <= 8
    obs = observe(net, x, x_adv, y, layers=("act1", "act2"))
    scalars = {
        "val/clean_acc": 0.93,
        "val/robust_acc": 0.61,
        "train/robust_acc": 0.9,
        "train/loss": 1.0,
        "train/loss/kl": 0.4,
    }
    ids, names = tuple(f"val-{i}" for i in range(8)), ("zero", "one", "two", "three", HOSTILE)
    return Probe(net, obs, ("act1", "act2"), ids, names, scalars, images(30, seed=3))


def test_every_public_panel_and_every_yaml_has_a_row() -> None:
    public = {name for name in views.__all__ if name.endswith("Panel")}
    assert {type(make()).__name__ for make in PANELS.values()} == public
    assert sorted(PANELS) == options("panels")
    for name, make in PANELS.items():
        assert (
            f"_target_: glassarmor.interpret.views.{type(make()).__name__}" in (CONFIGS / f"panels/{name}.yaml").read_text()
        )


@each
def test_the_view_is_whole_and_drawn_by_both(name: str, probe: Probe, tmp_path) -> None:
    """Says what to conclude and how to read it; its charts go to the page, its picture and its table to W&B."""
    panel = PANELS[name]()
    view = panel(probe)
    assert isinstance(view, View)
    assert view.name == panel.name == name
    assert view.title
    assert view.headline
    assert view.how_to_read or not view.charts
    assert {key: value for key, value in view.scalars.items() if not isinstance(value, float) or math.isinf(value)} == {}
    if name in WITHOUT_PICTURE:
        assert view.drawing is None
    else:
        assert view.charts
        assert view.drawing is not None
        picture = figures.to_array(view.drawing)
        assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
        assert picture.std() > 5, "not one colour"
    if view.table is not None:
        assert isinstance(view.table, Table)
        assert all(len(row) == len(view.table.columns) for row in view.table.rows)
    page = ReportPage(tmp_path, "run")
    page.write_epoch(1, 1, probe.scalars, [view])
    assert HOSTILE not in page.finish(inline=True).read_text()


@each
def test_the_net_and_all_generators_are_as_they_were_and_the_same_is_said_again(name: str, probe: Probe) -> None:
    panel = PANELS[name]()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    with unchanged(probe.net):
        first = panel(probe)
        again = panel(Probe(probe.net, probe.obs, probe.layers, probe.ids, probe.class_names, probe.scalars, probe.training))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert first.headline == again.headline
    assert first.scalars == again.scalars
    one, two = ([storage.to_json(encode(chart).chart) for chart in view.charts] for view in (first, again))
    assert one == two


@each
def test_no_number_is_left_to_its_bare_name_in_the_summary_of_a_card(name: str, probe: Probe) -> None:
    scalars = PANELS[name]()(probe).scalars
    sentences, _ = summarised(dict.fromkeys(scalars, 0.5))
    assert [text for text in sentences if text.split(":")[0] in scalars] == []
