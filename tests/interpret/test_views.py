"""Views: colours, figures, panels and the local page, up to a real browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glassarmor.interpret import storage
from glassarmor.interpret.observation import observe
from glassarmor.interpret.signals.conductance import conductance
from glassarmor.interpret.signals.pse import KIND_NAMES, region_effects
from glassarmor.interpret.signals.restoration import restoration_curve
from glassarmor.interpret.signals.sensitivity import sensitivity_control
from glassarmor.interpret.storage import write_atomic
from glassarmor.interpret.views.charts import Bars, Chart, Intervals, Lines, MapColumn, Maps, Scatter, Table, Trend
from glassarmor.interpret.views.draw import figures, raster
from glassarmor.interpret.views.page import encode
from glassarmor.interpret.views.page.page import ReportPage, read_script
from glassarmor.interpret.views.panels import cam, pse, training, units
from glassarmor.interpret.views.panels.restoration import RestorationPanel
from glassarmor.interpret.views.panels.sensitivity import SensitivityPanel
from glassarmor.interpret.views.view import Probe, View

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


# ---- colours --------------------------------------------------------------------------------------------------------


def lightness(table: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours, written from the standard."""
    c = table / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def test_lightness_of_the_scales_follows_the_magnitude() -> None:
    middle = raster.LEVELS // 2
    signed = lightness(raster.DIVERGING)
    assert (np.diff(signed[: middle + 1]) > -0.4).all()  # 8-bit rounding
    assert (np.diff(signed[middle:]) < 0.4).all()
    assert signed[middle] > 96
    assert np.abs(signed - signed[::-1]).max() < 6  # a grey print cannot tell the arms apart: magnitude only
    positive = lightness(raster.SEQUENTIAL)
    assert (np.diff(positive) < 0.4).all()
    assert positive[0] - positive[-1] > 60
    assert np.ptp(raster.DIVERGING[middle].astype(int)) <= 2  # zero is neutral


def test_signed_scale_is_odd_shared_and_saturates() -> None:
    values = np.array([-2.0, -0.25, 0.0, 0.25, 1.0, 2.0])
    np.testing.assert_allclose(raster.signed_sqrt(values, 1.0), [-1, -0.5, 0, 0.5, 1, 1])
    np.testing.assert_array_equal(raster.colour_signed(values, 1.0)[-1], raster.DIVERGING[-1])
    np.testing.assert_array_equal(raster.colour_signed(values, 0.0), np.broadcast_to(raster.DIVERGING[127], (6, 3)))
    np.testing.assert_array_equal(raster.colour_signed(np.array([np.nan]), 1.0)[0], raster.NO_VALUE)
    np.testing.assert_array_equal(raster.colour_positive(np.array([-1.0]), 1.0)[0], raster.SEQUENTIAL[0])


@pytest.mark.parametrize(("value", "limit"), [(0.0, 1.0), (0.7, 1.0), (1.0, 1.0), (2.1, 5.0), (0.031, 0.05), (60, 100.0)])
def test_nice_limit(value: float, limit: float) -> None:
    assert raster.nice_limit(value) == pytest.approx(limit)


def test_compose_places_tiles() -> None:
    red, green = np.zeros((2, 2, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    red[..., 0], green[..., 1] = 200, 100
    picture = raster.compose([[red, green]], tile=8, gap=2)
    assert picture.shape == (8, 18, 3)
    assert (picture[:, :8] == [200, 0, 0]).all()
    assert (picture[:, 8:10] == 255).all()
    assert (picture[:, 10:] == [0, 100, 0]).all()


# ---- figures --------------------------------------------------------------------------------------------------------


def some_maps(rows: int = 2, seed: int = 0, name: str = "val-0") -> Maps:
    rng = np.random.default_rng(seed)
    signed = rng.normal(size=(rows, 8, 8))
    return Maps(
        "Maps",
        tuple(f"{name} · true {i}" for i in range(rows)),
        (
            MapColumn("Clean", np.random.default_rng(9).random((rows, 16, 16, 3)), "image"),
            MapColumn("Effect", signed, "signed", "logits"),
            MapColumn("Large", rng.normal(size=(rows, 32, 32)), "signed", "logits", overlay=True, scale_group="cam"),
            MapColumn("Size", np.abs(signed), "positive", "logits"),
            MapColumn("Kind", rng.integers(0, 4, (rows, 8, 8)), "category", categories=KIND_NAMES),
        ),
    )


def assert_picture(picture: np.ndarray) -> None:
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert picture.max() > 200
    assert picture.std() > 5


def test_figures_are_pictures(tmp_path: Path) -> None:
    assert_picture(figures.to_array(figures.maps_figure(some_maps(), {"effect": 1.0}, "A $heading_ of one line")))
    bars = Bars("Units", ("a", "b"), (2.0, -1.0), "σ", reference=(0.5, 0.5), reference_label="control")
    assert_picture(figures.to_array(figures.charts_figure([bars, bars, bars, bars], "Bars")))
    lines = Lines("Curves", (0.0, 1.0), "strength", ("a", "b"), ((0.0, 1.0), (float("nan"), 2.0)), "logits")
    points = Scatter("Units", "x", "y", ("a", "b"), (0.0, 1.0), (1.0, 0.0), (1.0, 2.0), "σ", (0, 1), ("l", "m"), "equal")
    assert_picture(figures.to_array(figures.charts_figure([lines, points], "Curves and points")))
    figure = figures.charts_figure([bars])
    for name in ("bars.png", "bars.svg"):
        figures.save(figure, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    written = (tmp_path / "bars.svg").read_bytes()
    figures.save(figures.charts_figure([bars]), tmp_path / "bars.svg")
    assert (tmp_path / "bars.svg").read_bytes() == written


def test_figure_scale_is_fixed_over_epochs() -> None:
    """The same value has the same colour whatever else is in the picture."""
    one = Maps("m", ("a",), (MapColumn("e", np.full((1, 4, 4), 0.25), "signed"),))
    two = Maps("m", ("a",), (MapColumn("e", np.array([[[0.25] * 4, [0.9] * 4, [3.0] * 4, [0.0] * 4]]), "signed"),))
    a, b = (figures._pictures(m, {"effect": 1.0})[0][0] for m in (one, two))
    np.testing.assert_array_equal(a[0], b[0])


# ---- encoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "top"), [(8, 32767), (32, 127)])
def test_quantisation_is_off_by_at_most_half_a_step(side: int, top: int) -> None:
    values = np.random.default_rng(0).normal(size=(side, side)) * 7
    values[0, 0] = np.nan
    codes, step = encode.quantise(values)
    assert step == pytest.approx(np.nanmax(np.abs(values)) / top)
    assert codes[0, 0] == np.iinfo(codes.dtype).min, "no value"
    off = np.abs(codes * step - values)
    assert np.nanmax(off.ravel()[1:]) <= step / 2 * (1 + 1e-9)
    assert (encode.quantise(np.zeros((4, 4)))[0] == 0).all()


def test_json_is_strict_and_safe_inside_a_script() -> None:
    text = storage.to_json({"name": HOSTILE, "nan": float("nan"), "n": np.float32(0.5), "rows": (np.int64(3), 1e300)})
    assert "<" not in text
    assert json.loads(text) == {"name": HOSTILE, "nan": None, "n": 0.5, "rows": [3, 1e300]}


def test_large_maps_shrink_by_block_means() -> None:
    values = np.arange(2 * 128 * 128, dtype=float).reshape(2, 128, 128)
    small = encode.shrink(values, 64)
    assert small.shape == (2, 64, 64)
    assert small[0, 0, 0] == values[0, :2, :2].mean()
    assert encode.shrink(values[:, :32, :32], 64).shape == (2, 32, 32)
    kinds = encode.shrink(np.full((1, 100, 100), 3), 64, average=False)
    assert kinds.shape == (1, 50, 50)
    assert (kinds == 3).all()


def test_encode_says_what_is_wrong() -> None:
    wrong = Maps("Pictures", ("a", "b"), (MapColumn("Effect", np.zeros((3, 4, 4)), "signed"),))
    with pytest.raises(ValueError, match="Effect: expected 2 maps, found 3"):
        encode.encode(wrong)
    with pytest.raises(TypeError, match="found int"):
        encode.encode(3)  # type: ignore[arg-type]


# ---- the page -------------------------------------------------------------------------------------------------------


def some_views(epoch: int, name: str = "val-0") -> list[View]:
    charts: tuple[Chart, ...] = (
        Trend("Accuracy", ("val/clean_acc", "val/robust_acc"), ("clean", "robust"), "%", limits=(0, 1)),
        Trend("Kinds", ("a", "b"), ("a", "b"), style="share"),
        Bars("Bars", (name, "unit 1"), (2.0, -1.0), "σ", reference=(1.0, 1.0), reference_label="mean"),
        Intervals("Above", "points", (name, "b"), (1.0, 0.2), (0.5, float("nan")), (1.5, float("nan")), ("+1.0", name), 2.0),
        some_maps(seed=epoch, name=name),
        Table("Cells", ("id", "value"), [(name, 0.5), ("val-1", float("nan"))]),
        Lines("Curves", (0.0, 0.5, 1.0), "strength", (name, "b"), ((0.0, float("nan"), 1.0), (2.0, 1.0, 0.5)), "logits"),
        Scatter(
            "Points",
            "x",
            "y",
            (name, "unit 1", "unit 2"),
            (0.0, 1.0, float("nan")),
            (1.0, 0.5, 2.0),
            (1.0, 2.0, 3.0),
            "σ",
            (0, 0, 0),
            (name,),
            "alike",
            replace(some_maps(seed=epoch, name=name), own_scale=True),
            (1, 0, -1),
        ),
    )
    return [
        View("one", "First panel", f"Headline {epoch} {name}", charts, scalars={"a": 0.25, "b": 0.75}, how_to_read="So.")
    ]


def write_epochs(page: ReportPage, epochs: range, name: str = "val-0") -> None:
    for epoch in epochs:
        scalars = {"val/clean_acc": 0.9, "val/robust_acc": 0.1 * epoch, "train/loss": float("nan")}
        page.write_epoch(epoch, 10 * epoch, scalars, some_views(epoch, name))


def manifest_of(folder: Path) -> dict:
    return read_script(folder / "data" / "manifest.js")


def test_page_files_parse_and_share_images(tmp_path: Path) -> None:
    page = ReportPage(tmp_path, "run", {"dataset": "digits", "seed": 0})
    write_epochs(page, range(1, 4))
    manifest = manifest_of(tmp_path)
    assert [e["epoch"] for e in manifest["epochs"]] == [1, 2, 3]
    assert manifest["meta"] == [["dataset", "digits"], ["seed", "0"]]
    first, second, _ = manifest["epochs"]
    assert first["scalars"]["a"] == 0.25
    assert first["scalars"]["train/loss"] is None
    assert len(first["blobs"]) == 2
    assert second["blobs"] == []  # the clean images are stored once
    assert second["needs"] == [1]
    assert set(first["limits"]) == {"one/4/effect", "one/4/cam"}
    data = read_script(tmp_path / "data" / first["file"])
    effect = data["views"][0]["charts"][4]["columns"][1]
    assert effect["cells"][0]["bits"] == 16
    largest = np.abs(some_maps(seed=1).columns[1].values).max((1, 2))
    np.testing.assert_allclose(first["limits"]["one/4/effect"], largest, rtol=1e-5)
    assert not list(tmp_path.rglob(".*"))  # nothing temporary is left


def test_resume_keeps_earlier_epochs_and_drops_the_rest(tmp_path: Path) -> None:
    write_epochs(ReportPage(tmp_path, "run"), range(1, 5))
    page = ReportPage(tmp_path, "run", {"resumed": "yes"})
    assert page.epochs == (1, 2, 3, 4)
    page.drop_from(3)
    assert page.epochs == (1, 2)
    assert sorted(p.name for p in (tmp_path / "data").glob("epoch_*")) == ["epoch_00001.js", "epoch_00002.js"]
    write_epochs(page, range(3, 4))
    assert [e["epoch"] for e in manifest_of(tmp_path)["epochs"]] == [1, 2, 3]
    write_epochs(page, range(1, 2))  # what leaned on the rewritten epoch goes with it
    assert page.epochs == (1,)
    page.write_results(Table("Results", ("model", "PGD-20"), [("net", 0.6)]))
    assert ReportPage(tmp_path, "run")._manifest["results"]["rows"] == [["net", 0.6]]


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.js").write_text('GLASSARMOR.manifest({"schema":99});')
    with pytest.raises(ValueError, match="schema 99, expected 1"):
        ReportPage(tmp_path, "run")


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.js"
    write_atomic(target, "old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


class References(HTMLParser):
    """Everything a page would load, and the scripts it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.loads += [value or "" for key, value in attrs if key in ("src", "href")]


def test_finished_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    page = ReportPage(tmp_path, HOSTILE, {"dataset": HOSTILE})
    write_epochs(page, range(1, 4), HOSTILE)
    text = page.finish(inline=True).read_text()
    found = References()
    found.feed(text)
    assert all(load.startswith("#") or load == "data:," for load in found.loads)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)  # the SVG namespace is a name, not a place
    assert found.scripts == 2 + 1 + 1 + 3  # colours and program, start, manifest, one an epoch
    assert manifest_of(tmp_path)["complete"] is True
    assert 'id="inline-manifest"' not in page.finish(inline=False).read_text()


def test_hundred_epochs_stay_small(tmp_path: Path) -> None:
    """8 images at 32×32 with the columns of the default panels: below 0.3 MB an epoch."""
    rng = np.random.default_rng(0)
    image = rng.random((8, 32, 32, 3))
    titles = tuple(f"val-{i}" for i in range(8))
    page = ReportPage(tmp_path, "run")
    for epoch in range(2):
        adversarial = rng.random((8, 32, 32, 3))
        pair = (MapColumn("Clean", image, "image"), MapColumn("Adversarial", adversarial, "image"))
        maps = tuple(MapColumn(f"m{i}", rng.normal(size=(8, 32, 32)), "signed") for i in range(9))
        views = [View(f"v{i}", "v", "h", (Maps("m", titles, (*pair, *maps[3 * i : 3 * i + 3])),)) for i in range(3)]
        page.write_epoch(epoch, epoch, {}, views)
    assert (tmp_path / "data" / "epoch_00001.js").stat().st_size < 0.29e6


# ---- panels on a small network --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe() -> Probe:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    with torch.no_grad():
        net[-1].weight *= 20  # effects well above the floor
    x = torch.rand(4, 1, 16, 16)
    x_adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    y: Tensor = net(x).argmax(1)
    obs = observe(net, x, x_adv, y, layers=("1", "4"))
    scalars = {
        "val/clean_acc": 0.93,
        "val/robust_acc": 0.612,
        "train/robust_acc": 0.9,
        "train/loss": 1.0,
        "train/loss/kl": 0.4,
    }
    return Probe(net, obs, ("1", "4"), tuple(f"val-{i}" for i in range(4)), ("zero", "one", "two", HOSTILE), scalars)


def test_training_headline_names_the_figures(probe: Probe) -> None:
    view = training.TrainingPanel()(probe)
    assert view.headline.startswith("Held-out robust accuracy 61.2 %, clean 93.0 %.")
    assert "29 points higher" in view.headline
    assert [t.keys for t in view.charts if isinstance(t, Trend)][1] == ("train/loss", "train/loss/kl")


def test_pse_view_shows_the_effects_and_the_fixed_ids(probe: Probe) -> None:
    panel = pse.PSEPanel(grid=(4, 4), images=3)
    view, effects = panel(probe), probe.region_effects(panel.grid)
    assert sum(view.scalars[key] for key in pse.SHARE_KEYS) == pytest.approx(1)
    maps = next(c for c in view.charts if isinstance(c, Maps))
    promotion = next(c for c in maps.columns if c.title.startswith("Promotion"))
    np.testing.assert_allclose(promotion.values, effects.promotion[:3].view(3, 4, 4).numpy())
    assert maps.row_titles[0].startswith("val-0 · true ")
    assert view.table is not None
    assert [row[0] for row in view.table.rows] == list(probe.ids)
    sums = dict(zip(view.table.columns, zip(*view.table.rows, strict=True), strict=True))
    np.testing.assert_allclose(sums["Σ promotion (logits)"], effects.promotion.sum(1).numpy(), atol=1e-4)


def test_units_panel_ranks_by_relative_sensitivity(probe: Probe) -> None:
    view = units.UnitsPanel(top=3)(probe)
    assert view.table is not None
    rows = [row for row in view.table.rows if row[0] == "4"]
    values = [row[2] for row in rows]
    assert values == sorted(values, reverse=True)
    assert {row[1] for row in rows} == set(range(len(rows)))  # every unit, once
    assert set(view.scalars) == {f"units/{kind}/{layer}" for kind in ("sensitivity", "gap") for layer in ("1", "4")}
    assert view.scalars["units/gap/4"] < 1e-4  # below pooling and a linear head nothing is left out


def test_the_unit_scatter_shows_conductance_and_the_units_own_maps(probe: Probe) -> None:
    view = units.UnitsPanel(detailed=2)(probe)
    scatter = next(c for c in view.charts if isinstance(c, Scatter))
    obs = probe.obs
    expected = conductance(probe.net, obs.clean.x, obs.adv.x, obs.y, obs.target, layers=["1", "4"], steps=10).units
    np.testing.assert_allclose(
        scatter.y, np.concatenate([expected[layer].promotion.mean(0).numpy() for layer in ("1", "4")]), atol=1e-5
    )
    assert scatter.details is not None
    shown = [i for i, row in enumerate(scatter.detail_rows) if row >= 0]
    assert len(shown) == len(scatter.details.row_titles)
    for i in shown:  # the row of a unit is that unit's activation at x' less that at x
        layer, unit = scatter.names[i].split(", unit ")
        clean, adv, difference = (c.values[scatter.detail_rows[i]] for c in scatter.details.columns[:3])
        act = obs.adv.acts[layer][0, int(unit)].detach().numpy()
        np.testing.assert_allclose(adv.mean(), act.mean(), atol=1e-6)  # block means, or repetition
        np.testing.assert_allclose(adv - clean, difference, atol=1e-6)


def test_sensitivity_panel_sets_the_attack_beside_noise_of_equal_norm(probe: Probe) -> None:
    obs = probe.obs
    view = SensitivityPanel(draws=2, points=3)(probe)
    controls = sensitivity_control(probe.net, obs.clean.x, obs.adv.x, obs.y, ["1", "4"], draws=2)
    scatter = next(c for c in view.charts if isinstance(c, Scatter))
    np.testing.assert_allclose(scatter.x, np.concatenate([c.noise.numpy() for c in controls.values()]), atol=1e-6)
    np.testing.assert_allclose(scatter.y, np.concatenate([c.attack.numpy() for c in controls.values()]), atol=1e-6)
    share = float((controls["4"].attack > controls["4"].noise).float().mean())
    assert view.scalars["sensitivity/attack_sensitive/4"] == pytest.approx(share)
    logits = next(c for c in view.charts if isinstance(c, Lines) and c.title.startswith("Logits"))
    assert logits.series[1][-1] == pytest.approx(float(obs.logit("target", "adv").detach().mean()), abs=1e-5)
    assert logits.series[0][0] == pytest.approx(float(obs.logit("true", "clean").detach().mean()), abs=1e-5)


def test_restoration_panel_draws_the_three_orders_or_says_that_nothing_was_turned(probe: Probe) -> None:
    panel = RestorationPanel(grid=(4, 4), draws=2)
    obs = probe.obs
    right = replace(obs, y=obs.clean.logits.argmax(1))  # then what changes its answer was turned
    view = panel(replace(probe, obs=right, _known={}))
    expected = restoration_curve(
        probe.net,
        obs.clean.x,
        obs.adv.x,
        right.y,
        region_effects(probe.net, obs.clean.x, obs.adv.x, right.y, obs.target, regions=(4, 4)),
        (4, 4),
        draws=2,
    )
    if expected.samples:
        lines = next(c for c in view.charts if isinstance(c, Lines))
        assert lines.series[0] == tuple(expected.by_effect.tolist())
        assert view.scalars["restoration/effect"] == pytest.approx(expected.areas["effect"])
    wrong = replace(obs, y=(obs.clean.logits.argmax(1) + 1) % obs.clean.logits.shape[1])
    nothing = panel(replace(probe, obs=wrong, _known={}))
    assert nothing.charts == ()
    assert "nothing to restore" in nothing.headline


def test_cam_panel_shows_the_score_with_its_controls_and_the_overlap(probe: Probe) -> None:
    view = cam.CAMPanel(images=2, quantile=0.5, grid=(4, 4))(probe)
    table = next(c for c in view.charts if isinstance(c, Table))
    assert sum(row[2] for row in table.rows if row[1] == "target, adversarial") == 16 * len(probe.ids)  # type: ignore[misc]
    bars = next(c for c in view.charts if isinstance(c, Bars))
    assert bars.values[0] == pytest.approx(view.scalars["cam/interpretability"])
    assert bars.reference is not None
    assert bars.reference[0] == pytest.approx(np.sqrt(0.5), abs=0.02)  # half of the places


def test_cam_difference_is_the_difference_of_the_maps(probe: Probe) -> None:
    maps = next(c for c in cam.CAMPanel(images=3)(probe).charts if isinstance(c, Maps))
    clean, adv, change = (c.values for c in maps.columns[2:5])
    np.testing.assert_allclose(adv - clean, change, atol=1e-5)
    assert change.shape == (3, 8, 8)


# ---- a real browser -------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def open_in_browser(page: Path, profile: Path) -> str:
    """The document after its scripts ran."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=4000 --dump-dom"
    )
    command = [str(BROWSER), *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("inline", [False, True], ids=["beside", "inline"])
def test_page_opens_from_disk(tmp_path: Path, inline: bool) -> None:
    page = ReportPage(tmp_path / "report", f"run {HOSTILE}", {"dataset": HOSTILE})
    write_epochs(page, range(1, 4), HOSTILE)
    page.write_results(Table("Final comparison", ("model", "PGD-20"), [(HOSTILE, 0.5)]))
    if inline:
        page.finish()
        shutil.rmtree(tmp_path / "report" / "data")
    dom = open_in_browser(page.index, tmp_path / "profile")
    assert re.search(r'<body[^>]* data-ready="1" data-epoch="3"', dom)
    assert "data-error" not in dom
    assert "<title>run &lt;/script&gt;" in dom  # not "owned"
    body = dom[dom.index("<main>") : dom.index("</main>")]
    assert "&lt;/script&gt;&lt;script&gt;document.title" in body  # shown as text
    assert "<img" not in body
    assert "<script" not in body
    assert body.count("<canvas") == 2 * 5 + 5  # two rows of five maps, and the details of one point
    assert body.count("mark-point") == 2  # a point without a number is left out
    assert "Final comparison" in body
    assert "epoch 3 · step 30" in dom


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_page_says_so_when_its_data_are_missing(tmp_path: Path) -> None:
    page = ReportPage(tmp_path / "report", "run")
    shutil.rmtree(tmp_path / "report" / "data")
    assert "data/manifest.js is missing" in open_in_browser(page.index, tmp_path / "profile")


def test_a_table_for_wandb_is_one_of_the_charts() -> None:
    table = Table("t", ("a",), [(1,)])
    assert View("v", "V", "", (table,), table=table).table is table
    with pytest.raises(ValueError, match="view v: expected the table for W&B to be one of its charts"):
        View("v", "V", "", (), table=table)
