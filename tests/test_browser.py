"""The page of a real run in a real browser: it loads, its views move together, and names are shown, never run."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright
from torch import nn

import train
from interpret.observation import observe
from interpret.views.encode import to_json
from interpret.views.page import ReportPage, read_script
from interpret.views.profiles import ProfilesPanel
from interpret.views.view import Probe
from tests.composing import SMALL

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
PANELS = ("training", "pse", "restoration", "units", "sensitivity", "dissection", "profiles", "cam", "attribution")


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
    page.select_option('[aria-label="Compare with another epoch"]', "0")
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


def test_a_point_of_the_unit_scatter_shows_its_maps(page: Page) -> None:
    section = page.locator("#panel-units")
    before = section.locator(".detail th b").inner_text()
    name = section.locator('.mark-point[aria-pressed="false"]').first.get_attribute("data-name")
    section.locator(f'.mark-point[data-name="{name}"]').dispatch_event("click")
    assert section.locator(f'.mark-point[data-name="{name}"]').get_attribute("aria-pressed") == "true"
    text = section.locator(".detail").inner_text()
    assert "no maps are kept" in text or section.locator(".detail th b").inner_text() != before


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
        page.wait_for_function("document.getElementById('epoch-label').textContent.startsWith('epoch 1')", timeout=15000)
        assert "40.0 %" in page.inner_text("#overview")
        assert complaints == []


def test_hostile_names_are_shown_and_not_run(browser: Browser, tmp_path: Path) -> None:
    evil = '</script><img src=x onerror="alert(1)"><b>cat</b>'
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.rand(2, 1, 8, 8)
    obs = observe(net, x, (x + 0.2).clamp(0, 1), torch.tensor([0, 1]))
    training = (torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
    view = ProfilesPanel(per_class=2, points=2)(Probe(net, obs, (), (evil, "val-1"), (evil, "dog"), {}, training))
    report = ReportPage(tmp_path, evil)
    report.write_epoch(0, 1, {}, [view])
    with watched(browser, report.finish().as_uri()) as (page, complaints):
        assert page.locator(".examples img").count() == 0
        assert evil in page.locator(".example").first.inner_text()
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
        (tmp_path / "data" / entry["file"]).write_text(f"GLASSARMOR.epoch({to_json({**body, 'epoch': epoch})});\n")
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
