"""The page of a real run in a real browser: it loads, its views move together, and names are shown, never run."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright
from torch import nn

from glassarmor.interpret.observation import observe
from glassarmor.interpret.views.charts import Intervals, Scatter, Table
from glassarmor.interpret.views.page.page import ReportPage, packed, read_script
from glassarmor.interpret.views.panels.health import health_view
from glassarmor.interpret.views.panels.profiles import ProfilesPanel
from glassarmor.interpret.views.panels.versus import versus_view
from glassarmor.interpret.views.view import Answer, Probe, View
from glassarmor.lightning_modules.commands import train
from tests.composing import SMALL

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
PANELS = ("health", "training", "pse", "restoration", "units", "sensitivity", "dissection", "profiles", "cam", "attribution")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small but whole run of the default configuration, three epochs."""
    out = tmp_path_factory.mktemp("runs")
    steps = ("defense.attack.steps=2", "val_attack.steps=2", "probe.attack.steps=5", "compare_undefended=false")
    quick = (*SMALL, *steps, "wandb.mode=disabled", "trainer.max_epochs=3", "threads=1", "probe.training=100")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", os.devnull)
        patch.setattr(sys, "argv", ["train.py", *quick, "panels.dissection.concepts.count=60", f"out={out}", "name=run"])
        hydra.core.global_hydra.GlobalHydra.instance().clear()
        train.main()
    return out / "run" / "report"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The report, opened from disk; any complaint of the page fails the test."""
    with watched(browser, (report / "index.html").as_uri()) as (page, complaints):
        yield page
        assert complaints == []


class watched:
    """A tab on a page, ready, with everything that went wrong in it."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser, self.address = browser, address

    def __enter__(self) -> tuple[Page, list[str]]:
        self.page = self.browser.new_page(viewport={"width": 1300, "height": 1000})
        self.page.set_default_timeout(90_000)  # milliseconds: a busy machine is no fault of the page
        complaints: list[str] = []
        self.page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (complaints.append("a dialog opened"), dialog.dismiss()))
        self.page.goto(self.address)
        self.page.wait_for_selector("body[data-ready]")
        return self.page, complaints

    def __exit__(self, *error: object) -> None:
        self.page.close()


def pixels(page: Page, selector: str) -> list[str]:
    """What the canvases of a part of the page show."""
    found = page.eval_on_selector_all(f"{selector} canvas", "nodes => nodes.map((node) => node.toDataURL())")
    assert found
    return list(found)


def test_it_loads_over_localhost_too(browser: Browser, report: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(report))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with watched(browser, f"http://127.0.0.1:{server.server_address[1]}/index.html") as (page, complaints):
            assert page.locator("section[data-epoch]").count() == len(PANELS)
            assert complaints == []
        server.shutdown()


def test_the_slider_moves_every_panel(page: Page, report: Path) -> None:
    epochs = read_script(report / "data" / "manifest.js")["epochs"]
    assert page.get_attribute("body", "data-epoch") == "2"
    before = pixels(page, "#panel-pse")
    page.focus("#slider")
    page.keyboard.press("Home")
    page.wait_for_selector('body[data-epoch="0"]')
    for said in epochs[0]["headlines"]:
        panel = page.locator(f"#panel-{said['name']}")
        assert panel.get_attribute("data-epoch") == "0"
        assert panel.locator(".headline").inner_text().replace("\u00a0", " ") == said["headline"]
    assert {said["name"] for said in epochs[0]["headlines"]} == set(PANELS)
    assert pixels(page, "#panel-pse") != before


def test_the_architecture_view_decides_what_the_flow_shows(page: Page) -> None:
    flow, known = page.locator(".flow"), page.locator(".architecture .known")
    layers = known.count()
    assert flow.get_attribute("data-layers") == str(layers)
    name = known.nth(1).get_attribute("data-layer")
    known.nth(1).click()
    assert flow.get_attribute("data-layers") == str(layers - 1)
    assert page.locator(f'.flow [data-layer="{name}"]').count() == 0
    known.nth(1).press("Enter")  # the keyboard does the same
    assert flow.get_attribute("data-layers") == str(layers)


def test_an_example_changes_the_flow_and_the_layer_view(page: Page) -> None:
    line, maps = page.locator(".adv-line").get_attribute("d"), pixels(page, ".unit-grid")
    layer = page.get_attribute(".unit-grid", "data-layer")
    chosen = page.locator('.example[aria-pressed="true"]').get_attribute("data-example")
    other = next(i for i in range(8) if str(i) != chosen)
    page.locator(f'.example[data-example="{other}"]').click()
    assert page.get_attribute(".unit-grid", "data-example") == str(other)
    assert page.locator(".adv-line").get_attribute("d") != line
    page.locator(f'.profiles .chip:text-is("{layer}")').click()
    assert pixels(page, ".unit-grid") != maps


def test_strength_and_comparison_draw_other_lines(page: Page) -> None:
    clean, whole = (page.locator(line).get_attribute("d") for line in (".clean-line", ".adv-line"))
    page.locator('[aria-label="Attack strength"]').fill("0")
    assert page.locator(".adv-line").get_attribute("d") == clean  # no perturbation, no difference
    assert whole != clean
    page.select_option('[aria-label="Compare with"]', "epoch 0")
    page.wait_for_selector(".flow .against")
    assert page.locator(".flow .against").count() == 2


def test_units_sort_and_filter(page: Page) -> None:
    shown = page.locator(".unit-grid .unit").count()
    page.select_option('[aria-label="Sort units by"]', "sensitivity (σ)")
    cards = page.locator(".unit-grid .unit dl").all_inner_texts()
    values = [float(text.split("sensitivity (σ)")[1].split()[0].replace("−", "-")) for text in cards]
    assert values == sorted(values, reverse=True)
    first = page.locator(".unit-grid .unit").first.get_attribute("data-unit")
    page.fill('[aria-label="Filter units"]', f"unit {first}")
    page.locator('[aria-label="Filter units"]').press("Tab")
    assert 1 <= page.locator(".unit-grid .unit").count() < shown


def test_units_filter_by_the_number_they_are_sorted_by(page: Page) -> None:
    page.select_option('[aria-label="Sort units by"]', "above noise (σ)")
    cards = page.locator(".unit-grid .unit dl").all_inner_texts()
    values = sorted(float(text.split("above noise (σ)")[1].split()[0].replace("−", "-")) for text in cards)
    middle = (values[3] + values[4]) / 2
    page.fill('[aria-label="Filter units"]', f"> {middle}")
    page.locator('[aria-label="Filter units"]').press("Tab")
    assert page.locator(".unit-grid .unit").count() == sum(value > middle for value in values)


def test_maps_of_units_are_clean_attacked_difference_and_first_filters(page: Page) -> None:
    first = page.locator(".architecture .known").first.get_attribute("data-layer")
    page.locator(f'.profiles .chip:text-is("{first}")').click()
    card = page.locator(".unit-grid .unit").first
    assert [m.get_attribute("title") for m in card.locator("canvas").all()[:3]] == ["clean", "attacked", "attacked − clean"]
    assert card.locator("canvas").count() == 4  # a convolution that looks at the image has filters to show
    last = page.locator(".architecture .known").last.get_attribute("data-layer")
    page.locator(f'.profiles .chip:text-is("{last}")').click()
    assert page.locator(".unit-grid .unit").first.locator("canvas").count() == 3


def test_the_architecture_view_is_coloured_by_what_is_chosen_on_one_scale(page: Page) -> None:
    choices = page.locator('[aria-label="Colour of the layers"] option').all_inner_texts()
    for word in ("divergence", "turn", "sensitivity", "promotion", "suppression"):
        assert any(word in choice for choice in choices), word
    fills, legends = set(), []
    for choice in choices:
        page.select_option('[aria-label="Colour of the layers"]', choice)
        fills.add(
            str(page.eval_on_selector_all(".architecture .known rect", "nodes => nodes.map((n) => n.getAttribute('fill'))"))
        )
        legends.append(page.locator(".profiles .legend:has(+ .scroll .architecture)").inner_text())
    assert len(fills) >= 4
    assert all(choice in legend for choice, legend in zip(choices, legends, strict=True))
    page.press("body", "Home")
    page.wait_for_selector('body[data-epoch="0"]')
    assert page.locator(".profiles .legend:has(+ .scroll .architecture)").inner_text() == legends[-1]  # as at the last epoch


def test_the_keyboard_steers(page: Page) -> None:
    page.press("body", "ArrowLeft")
    page.wait_for_selector('body[data-epoch="1"]')
    page.press("body", "End")
    page.wait_for_selector('body[data-epoch="2"]')
    chosen = int(page.get_attribute('.example[aria-pressed="true"]', "data-example") or 0)
    page.press("body", "[" if chosen else "]")
    assert page.get_attribute('.example[aria-pressed="true"]', "data-example") == str(chosen - 1 if chosen else 1)
    page.press("body", "j")
    page.wait_for_function("document.getElementById('panel-health').getBoundingClientRect().top < 200")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.press("body", "t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.press("body", "Home")
    page.wait_for_selector('body[data-epoch="0"]')
    page.press("body", "p")
    page.wait_for_selector('body[data-epoch="2"]')  # it plays through to the end


def test_the_first_screen_answers_a_newcomer(page: Page) -> None:
    """The five questions of docs/reading-the-page.md before anything else; the first answer is about the run's health."""
    asked = page.locator(".answers dt").all_inner_texts()
    text = (Path(__file__).parents[2] / "docs" / "reading-the-page.md").read_text()
    assert len(asked) == 5
    assert all(f"## {question}" in text for question in asked)
    assert page.locator(".answers").bounding_box()["y"] < 500  # type: ignore[index]  # of 1000
    above = "document.querySelector('.answers').getBoundingClientRect().bottom <= "
    assert page.evaluate(f"{above} document.querySelector('.figure-value').getBoundingClientRect().top")
    verdict = page.locator("#panel-health .headline").inner_text()
    assert page.locator(".answers dd div").first.inner_text().startswith(verdict)
    changed = page.locator('.answers [data-question="changed"]').inner_text()
    assert "Since epoch 0: robust accuracy" in changed
    assert "Since epoch 1: robust accuracy" in changed
    command = page.locator('.answers [data-question="next"] code')
    page.locator('.answers [data-question="next"] .chip').first.click()
    chip = "document.querySelector('.answers [data-question=\"next\"] .chip').textContent === 'copied'"
    page.wait_for_function(f"{chip} || getSelection().toString() === {json.dumps(command.first.inner_text())}")


def test_a_narrow_window_never_scrolls_sideways(browser: Browser, report: Path) -> None:
    with watched(browser, (report / "index.html").as_uri()) as (page, complaints):
        page.set_viewport_size({"width": 420, "height": 900})
        page.wait_for_function("document.documentElement.scrollWidth <= innerWidth")
        assert complaints == []


def test_the_finished_page_is_one_file(browser: Browser, report: Path, tmp_path: Path) -> None:
    shutil.copy(report / "index.html", tmp_path / "sent.html")
    with watched(browser, (tmp_path / "sent.html").as_uri()) as (page, complaints):
        page.press("body", "Home")
        page.wait_for_selector('body[data-epoch="0"]')
        assert page.locator("section[data-epoch='0']").count() == len(PANELS)
        assert complaints == []


def test_a_point_of_the_unit_scatter_shows_its_maps(page: Page) -> None:
    section = page.locator("#panel-units")
    before = section.locator(".detail th b").inner_text()
    name = section.locator('.mark-point[aria-pressed="false"]').first.get_attribute("data-name")
    section.locator(f'.mark-point[data-name="{name}"]').dispatch_event("click")
    assert section.locator(f'.mark-point[data-name="{name}"]').get_attribute("aria-pressed") == "true"
    text = section.locator(".detail").inner_text()
    assert "no maps are kept" in text or section.locator(".detail th b").inner_text() != before


def test_a_comparison_names_its_points_and_breaks_no_number(browser: Browser, tmp_path: Path) -> None:
    names = ("base · b=1", "base · b=6", "ours", "beside ours")
    clean, robust = (44.0, 38.0, 41.0, 41.1), (20.0, 22.0, 23.0, 23.0)
    points = Scatter(
        "Fronts", "clean (%)", "PGD (%)", names, clean, robust, (1.0,) * 4, "", (0,) * 4, ("all",), named=True, line=(1, 0)
    )
    table = Table("Accuracy", ("method", "difference"), [("ours", "+1.0 [-0.5, +2.5]"), ("base", "40.1 ± 0.2")], open=True)
    nan = float("nan")
    forest = Intervals(
        "Above",
        "points",
        ("sure", "wide", "one"),
        (1.0, -1.0, 0.2),
        (0.5, -9.0, nan),
        (1.5, 7.0, nan),
        ("+1.0", "-1.0", "0"),
        2.0,
    )
    report = ReportPage(tmp_path, "comparison")
    report.write_epoch(0, 0, {}, [View("ablation", "Methods", "All is told.", (points, table, forest))])
    with watched(browser, report.index.as_uri()) as (page, complaints):
        panel = page.locator("#panel-ablation")
        assert sorted(panel.locator("svg text.beside").all_text_contents()) == sorted(names)
        boxes = [panel.locator("svg text.beside").nth(i).bounding_box() for i in range(4)]
        for i, one in enumerate(boxes):
            for other in boxes[:i]:
                apart = abs(one["y"] - other["y"]) > 8 or one["x"] + one["width"] <= other["x"] + 1
                assert apart or other["x"] + other["width"] <= one["x"] + 1
        line = panel.locator("polyline.joined").get_attribute("points").split()
        marks = {m.get_attribute("data-name"): m for m in panel.locator(".mark-point").all()}
        assert line == [",".join(marks[name].get_attribute(k) for k in ("cx", "cy")) for name in (names[1], names[0])]
        tracks = panel.locator(".intervals .track")
        left, width = (tracks.first.bounding_box()[key] for key in ("x", "width"))
        for track, (low, middle, high) in zip(tracks.all(), ((0.5, 1.0, 1.5), (-2, -1, 2), (nan, 0.2, nan)), strict=True):
            dot = track.locator("b").bounding_box()
            assert dot["x"] + dot["width"] / 2 == pytest.approx(left + width * (middle + 2) / 4, abs=1)
            if low == low:
                bar = track.locator("i").bounding_box()
                assert (bar["x"], bar["width"]) == pytest.approx(
                    (left + width * (low + 2) / 4, width * (high - low) / 4), abs=1
                )
        assert [track.locator("b.apart").count() for track in tracks.all()] == [1, 0, 0]
        assert [track.locator(".cut").count() for track in tracks.all()] == [0, 2, 0]
        assert tracks.nth(2).locator("i").count() == 0
        cells = panel.locator("td").all_text_contents()
        assert "+1.0 [-0.5,\u00a0+2.5]" in cells
        assert "40.1\u00a0±\u00a00.2" in cells
        assert complaints == []


def test_the_page_of_one_epoch_is_whole_in_itself(browser: Browser, report: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(report, tmp_path / "copy")
    alone = tmp_path / "alone.html"
    alone.write_text(ReportPage(copy, "run").one_epoch(2))
    shutil.rmtree(copy)
    with watched(browser, alone.as_uri()) as (page, complaints):
        assert page.locator("section[data-epoch='2']").count() == len(PANELS)
        assert page.locator("#player").is_hidden()
        assert len(pixels(page, "#panel-pse")) > 8
        assert complaints == []


def test_an_open_page_notices_a_new_epoch(browser: Browser, tmp_path: Path) -> None:
    report = ReportPage(tmp_path, "growing")
    report.write_epoch(0, 1, {"val/robust_acc": 0.1}, [])
    with watched(browser, report.index.as_uri()) as (page, complaints):
        assert page.get_attribute("body", "data-ready") == "1"
        report.write_epoch(1, 2, {"val/robust_acc": 0.4}, [])
        page.locator("#epoch-label", has_text="epoch 1").wait_for(timeout=15000)
        page.locator("#overview", has_text="40.0 %").wait_for(timeout=15000)
        assert complaints == []


def test_hostile_names_are_shown_and_not_run(browser: Browser, tmp_path: Path) -> None:
    evil = '</script><img src=x onerror="alert(1)"><b>cat</b>'
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.rand(2, 1, 8, 8)
    obs = observe(net, x, (x + 0.2).clamp(0, 1), torch.tensor([0, 1]))
    training = (torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
    view = ProfilesPanel(per_class=2, points=2)(Probe(net, obs, (), (evil, "val-1"), (evil, "dog"), {}, training))
    view = replace(view, answers=(Answer("next", evil, evil), *view.answers))
    report = ReportPage(tmp_path, evil)
    report.write_epoch(0, 1, {}, [view])
    with watched(browser, report.finish().as_uri()) as (page, complaints):
        assert page.locator(".examples img").count() == 0
        assert evil in page.locator(".example").first.inner_text()
        assert evil in page.locator(".answers").inner_text()
        assert evil in page.locator(".answers code").first.inner_text()
        assert complaints == []


@pytest.mark.parametrize("finished", [False, True])
def test_a_program_that_is_not_the_pages_does_not_run(browser: Browser, tmp_path: Path, finished: bool) -> None:
    """Even where markup got into the file: the policy names each program, and no server at all."""
    report = ReportPage(tmp_path, "run")
    report.write_epoch(0, 1, {"val/robust_acc": 0.1}, [])
    index = report.finish() if finished else report.index
    planted = '<script>document.title = "ran"</script><img src="x" onerror="document.title = \'ran\'"></body>'
    index.write_text(index.read_text().replace("</body>", planted))
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(index.as_uri())
    page.wait_for_selector('body[data-ready="1"]')
    assert page.title().startswith("run")
    assert sum("Content Security Policy" in text for text in said) >= 2
    page.close()


@pytest.mark.long
def test_a_collapsed_run_says_so_first_with_its_alarm_and_a_command(browser: Browser, tmp_path: Path) -> None:
    report = ReportPage(tmp_path, "run")
    ill = health_view({"gap": 0.4}, {"gap": 0.2}, "catastrophic overfitting: …", 8, "", "hold <b>", "python train.py x=1")
    report.write_epoch(0, 8, {"val/robust_acc": 0.9}, [ill])
    report.add_alarm(0, 8, "catastrophic overfitting: <b>", "rolled back to step 0")
    report.write_epoch(1, 16, {"val/robust_acc": 0.5}, [health_view({"gap": 0.0}, {"gap": 0.2})])
    with watched(browser, report.finish().as_uri()) as (page, complaints):
        assert page.locator(".answers dd div").first.inner_text().startswith("Healthy")
        assert page.locator(".answers code").count() == 0, "nothing to try"
        said = page.locator("#alarms").inner_text()  # of the whole run, also at its healthy end
        assert "epoch 0, step 8" in said
        assert "catastrophic overfitting: <b>" in said
        assert "rolled back to step 0" in said
        assert page.locator("svg .alarm").count() >= 1
        page.keyboard.press("Home")
        page.wait_for_selector('body[data-epoch="0"]')
        first = page.locator(".answers dd div").first
        assert first.inner_text().startswith("Not healthy: catastrophic overfitting: …. To try: hold <b>.")
        assert first.locator("code").inner_text() == "python train.py x=1"
        assert complaints == []


@pytest.mark.long
def test_two_networks_on_one_axis(browser: Browser, tmp_path: Path) -> None:
    """Nets of other layers and hostile names; each is drawn with the other's lines over it."""
    evil = '<img src=x onerror="alert(1)">'
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    nets = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *more, *head).eval() for more in ((), (nn.Conv2d(4, 4, 3),))]
    x, y = torch.rand(6, 1, 10, 10), torch.arange(6) % 3
    training = (torch.rand(12, 1, 10, 10), torch.arange(12) % 3)
    probes = tuple(
        Probe(
            net, observe(net, x, (x + 0.3).clamp(0, 1), y), (), tuple(f"t-{i}" for i in range(6)), tuple("abc"), {}, training
        )
        for net in nets
    )
    view = versus_view((evil, "robust"), (probes[0], probes[1]), ProfilesPanel(per_class=3, points=3))
    report = ReportPage(tmp_path, "two", overview=None)
    report.write_epoch(0, 0, {}, [view])
    with watched(browser, report.finish().as_uri()) as (page, complaints):
        assert page.locator("#panel-versus .profiles").count() == 2
        assert page.locator("#panel-versus .against").count() == 4
        first = page.locator("#panel-versus .profiles").first
        assert first.locator('[aria-label="Compare with"]').input_value() == "robust"
        assert evil in page.locator("#panel-versus").inner_text()
        legends = page.locator("#panel-versus .legend:has(+ .scroll .architecture)").all_inner_texts()
        assert legends[0] == legends[1]  # one colour scale for both
        first.locator('[aria-label="Compare with"]').select_option("")
        page.wait_for_function("document.querySelectorAll('#panel-versus .against').length === 2")
        assert complaints == []


@pytest.mark.long
def test_a_hundred_epochs_stay_small_and_open_fast(browser: Browser, report: Path, tmp_path: Path) -> None:
    """A run of 100 epochs, its data as large as the real run's and no two epochs alike."""
    last = read_script(report / "data" / "manifest.js")["epochs"][-1]
    body = read_script(report / "data" / last["file"])
    page = ReportPage(tmp_path, "long")
    entries = read_script(report / "data" / "manifest.js")["epochs"][:2]  # where later epochs find their pictures
    for entry in entries:
        shutil.copy(report / "data" / entry["file"], tmp_path / "data")
    for epoch in range(2, 100):
        entry = {**last, "epoch": epoch, "file": f"epoch_{epoch:05d}.js"}
        (tmp_path / "data" / entry["file"]).write_text(f"GLASSARMOR.epoch({packed({**body, 'epoch': epoch})});\n")
        entries.append(entry)
    page._replace_epochs(entries)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 30e6
    with watched(browser, page.index.as_uri()) as (tab, complaints):
        ready = tab.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        assert tab.get_attribute("body", "data-epoch") == "99"
        assert ready < 2000  # milliseconds
        tab.focus("#slider")
        tab.keyboard.press("Home")
        tab.wait_for_selector('body[data-epoch="0"]')
        assert complaints == []
