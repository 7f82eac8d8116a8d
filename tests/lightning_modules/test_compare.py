"""Comparing runs: the page and the table say what the run folders hold; what does not compare is refused."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from omegaconf import OmegaConf
from scipy import stats
from torch import nn

from glassarmor.interpret.observation import observe
from glassarmor.interpret.statistics import bootstrap_interval, holm
from glassarmor.interpret.views.charts import Intervals, Scatter, Table
from glassarmor.interpret.views.draw.ablation import Front, fronts_figure, intervals_figure, parallel_figure
from glassarmor.interpret.views.draw.figures import save
from glassarmor.interpret.views.draw.text import comma_separated, latex, markdown
from glassarmor.interpret.views.page.page import ReportPage, read_script
from glassarmor.interpret.views.panels.profiles import ProfilesPanel
from glassarmor.interpret.views.view import Probe
from glassarmor.lightning_modules.commands import study as compare
from glassarmor.lightning_modules.study.records import (
    Accuracies,
    RunRecord,
    read_record,
    read_records,
    record_of,
    write_correct,
    write_record,
)
from glassarmor.lightning_modules.study.report import _sweep, ablation_view, differences, headline
from glassarmor.lightning_modules.study.tables import accuracy_table, measured_tables, verdict_table
from glassarmor.lightning_modules.study.verdicts import above_front, by_method, chosen, settings_of, verdicts
from tests.composing import config
from tests.wandb_log import history


def make_run(
    folder: Path,
    robust: list[float],
    *overrides: str,
    finished: bool = True,
    what: str = "digits",
    test: float = 0.5,
    probe: str = "p0",
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config(*overrides), resolve=True))
    (folder / "run.json").write_text(json.dumps({"what": what, "commit": "abc", "probe": probe}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "val/robust_acc", "val/clean_acc", "pse/promotion"])
        writer.writerows([[i, 10 * i, value, 0.9, ""] for i, value in enumerate(robust)])
    if finished:
        (folder / "results.json").write_text(
            json.dumps({"threat": "Linf", "defended, best epoch": {"clean": 0.95, "PGD-20": test}})
        )
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    compare.run()


def test_runs_are_set_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_run(tmp_path / "one", [0.1, 0.6, 0.4])
    two = make_run(tmp_path / "two", [0.2, 0.3], "seed=1", "defense=pgd_at", finished=False)
    command(monkeypatch, one, two, "--out", tmp_path / "page")
    views = read_script(tmp_path / "page" / "data" / "epoch_00000.js")["views"]
    data = next(view for view in views if view["name"] == "comparison")
    assert data["headline"] == "Held-out robust accuracy at the best epoch: one 60.0 %, two 30.0 %."
    tables = {chart["title"]: chart["rows"] for chart in data["charts"] if chart["type"] == "table"}
    assert tables["Accuracy on the test set"] == [
        ["one", "defended, best epoch", 95.0, 50.0],
        ["two", "not finished", None, None],
    ]
    lines = next(c for c in data["charts"] if c["type"] == "lines" and c["title"].startswith("Robust"))
    assert lines["series"] == [[0.1, 0.6, 0.4], [0.2, 0.3, None]]
    assert [row[:2] for row in tables["What the dashboards measured at each run's best epoch"]] == [["one", 1], ["two", 1]]
    assert not any(c["title"].startswith("Promotion") for c in data["charts"])  # nobody measured it


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("threat.eps=0.1",), "threat differs"),
        (("data.val_fraction=0.3",), "data differs"),
        (("threat=l2",), "threat differs"),
        (("threat.eps=0.1",), "the threat model: threat.eps is 0.06 and 0.1"),
        (("data.val_fraction=0.3",), "the split: data.val_fraction is 0.15 and 0.3"),
        (("val_attack.steps=7",), "the selection: val_attack.steps is 20 and 7"),
        (("+attack@test_attacks.adaptive=adaptive_pgd",), "the evaluation: test_attacks.adaptive"),
        (
            ("trainer.max_epochs=3",),
            "the training effort (--any-effort compares all the same): trainer.max_epochs is 20 and 3",
        ),
    ],
)
def test_what_does_not_compare_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    words: str,
) -> None:
    one, two = make_run(tmp_path / "one", [0.1]), make_run(tmp_path / "two", [0.2], *overrides)
    with pytest.raises(SystemExit):
        command(monkeypatch, one, two, "--out", tmp_path / "page")
    assert words in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_one_run_or_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, make_run(tmp_path / "one", [0.1]))
    assert "at least two run folders, found 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path / "one", tmp_path / "nowhere")
    assert "found none at" in capsys.readouterr().err


def test_other_effort_compares_when_asked_and_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make_run(tmp_path / "one", [0.1]), make_run(tmp_path / "two", [0.2], "trainer.max_epochs=3")
    command(monkeypatch, one, two, "--out", tmp_path / "page", "--any-effort")
    view = read_script(tmp_path / "page" / "data" / "epoch_00000.js")["views"][0]
    assert view["headline"].endswith("Runs of unequal training effort are compared.")


def test_other_images_of_one_seed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same config on other data: only the hash of the probe images tells."""
    one = make_run(tmp_path / "one", [0.1])
    two, three = (make_run(tmp_path / f"s{s}", [0.1], f"seed={s}", "defense=mart", probe="p1") for s in (0, 1))
    with pytest.raises(SystemExit):
        command(monkeypatch, one, two, "--out", tmp_path / "page")
    assert "seed 0 gave them other validation images (hashes p0 and p1)" in capsys.readouterr().err
    command(monkeypatch, one, three, "--out", tmp_path / "page")  # another seed holds out other images


# ---- statistics over seeds ------------------------------------------------------------------------------------------

BASE, OURS = [0.50, 0.52, 0.51], [0.53, 0.54, 0.55]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds each of a baseline, of a method that gains, and of one that loses."""
    folder = tmp_path_factory.mktemp("runs")
    methods = {
        "trades": ("defense=trades", BASE),
        "pgd_at": ("defense=pgd_at", OURS),
        "mart": ("defense=mart", [0.49, 0.40, 0.45]),
    }
    return [
        make_run(folder / f"{what}{s}", [value], override, f"seed={s}", what=f"{what}-s{s}", test=value)
        for what, (override, values) in methods.items()
        for s, value in enumerate(values)
    ]


@pytest.mark.long
def test_the_table_says_what_scipy_says(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, *runs, "--out", tmp_path / "page", "--baseline", "trades")
    view = read_script(tmp_path / "page" / "data" / "epoch_00000.js")["views"][0]
    assert [chart["type"] for chart in view["charts"][:2]] == ["intervals", "scatter"]
    accuracy, against = (chart for chart in view["charts"][2:4])
    assert accuracy["columns"][:5] == ["method", "setting", "seeds", "clean (%)", "PGD-20 (%)"]
    assert accuracy["rows"][0][:5] == ["trades", "", "3", "95.0 ± 0.0", "51.0 ± 1.0"]
    row = dict(zip(against["columns"], against["rows"][0], strict=True))
    test = stats.ttest_rel(OURS, BASE)
    interval = test.confidence_interval()
    assert row["candidate"] == "pgd_at"
    assert row["Δ PGD-20"] == f"+3.0 [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    assert row["p"] == f"{test.pvalue:.3f}"
    assert row["p, flips"] == "0.250"
    other = stats.ttest_rel([0.49, 0.40, 0.45], BASE).pvalue
    assert row["p, Holm"] == f"{holm([test.pvalue, other])[0]:.3f}"
    assert against["rows"][1][-1] == "trades"  # what dominates the loser
    assert "+3.0 points (pgd_at, 3 seeds)" in view["headline"]
    assert "the test set was opened once" in view["howToRead"]
    text = (tmp_path / "page" / "tables.md").read_text()
    assert "| trades |  | 3 | 95.0 ± 0.0 | 51.0 ± 1.0 |" in text
    assert "![fronts](fronts.svg)" in text
    assert r"trades &  & 3 & 95.0 $\pm$ 0.0 & 51.0 $\pm$ 1.0" in (tmp_path / "page" / "tables.tex").read_text()
    with (tmp_path / "page" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["PGD-20"]) for row in rows[:6]] == [*BASE, *OURS]
    assert [row["seed"] for row in rows[:3]] == ["0", "1", "2"]
    for name in ("differences", "fronts"):
        assert "<svg" in (tmp_path / "page" / f"{name}.svg").read_text()


def test_a_baseline_or_attack_that_is_not_there_is_refused(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments, words in (
        (("--baseline", "alp"), "baseline: expected one of trades, pgd_at, mart; found 'alp'"),
        (("--attack", "CW"), "attack: expected one of PGD-20; found 'CW'"),
        (("--network", "undefended"), "no attack was run on 'undefended' in every run"),
        (("--wandb", "on"), "wandb.mode: expected"),
    ):
        with pytest.raises(SystemExit):
            command(monkeypatch, *runs, "--out", tmp_path / "page", *arguments)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_tables_reach_wandb(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    command(monkeypatch, *runs, "--out", tmp_path / "page", "--wandb", "offline")
    logged = next(row for row in history(tmp_path / "page" / "wandb") if "tables/runs" in row)
    assert {"tables/accuracy", "tables/verdicts", "tables/measured", "comparison/page"} - {
        "tables/measured"
    } <= logged.keys()
    assert logged["tables/runs"]["nrows"] == 9


def test_runs_that_differ_in_more_than_the_seed_are_told_apart(tmp_path: Path) -> None:
    three = [
        make_run(tmp_path / "a", [0.1]),
        make_run(tmp_path / "b", [0.1], "regularizers.pse.weight=2"),
        make_run(tmp_path / "c", [0.1], "seed=1", "regularizers.pse.weight=2", "out=elsewhere"),
    ]
    cards = read_records(three)
    assert [c.setting for c in cards] == ["regularizers.pse.weight=0.5", *["regularizers.pse.weight=2"] * 2]
    assert cards[1].config != cards[2].config != cards[0].config
    again = make_run(tmp_path / "d", [0.1], "out=elsewhere")
    assert record_of(again).config == cards[0].config
    with pytest.raises(ValueError, match=r"a and d are both digits .* with seed 0"):
        read_records([*three, again])


def test_a_card_holds_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [0.1, 0.6, 0.4])
    (run / "cost.json").write_text(
        json.dumps({"seconds": [1.5, 2.5], "cpu_seconds": [1.0, 1.0], "passes": 13.0, "steps": 9})
    )
    right, robust = torch.arange(20) > 0, torch.arange(20) % 2 == 0
    write_correct(run, {"defended, best epoch": {"clean": right, "PGD-20": robust}})
    card = record_of(run)
    assert card.selected == {"epoch": 1, "val/robust_acc": 0.6, "val/clean_acc": 0.9}
    assert card.cost == {"seconds": 4.0, "cpu_seconds": 2.0, "passes": 13.0, "steps": 9}
    write_record(card, tmp_path / "card.json")
    found = read_record(tmp_path / "card.json")
    best = found.evaluations["defended, best epoch"]
    assert best.correct["clean"].tolist() == right.tolist()
    assert best.correct["PGD-20"].tolist() == robust.tolist()
    assert (found.settled, found.seed, found.config) == (card.settled, card.seed, card.config)
    assert read_records([tmp_path / "card.json"])[0].cost == card.cost
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is no card of a run \(KeyError"):
        read_record(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"expected a run folder with config.yaml and run.json, or a card"):
        record_of(tmp_path)


def card(method: str, point: str, seed: int, clean: float, robust: float, held: float, **more) -> RunRecord:
    found = Accuracies({"clean": clean, "PGD": robust}, more.get("correct", {}))
    evaluations = {} if more.get("failure") else {"defended, best epoch": found}
    name = f"{method}{point}{seed}"
    return RunRecord(
        name, method, point, seed, name, {}, evaluations, {"val/robust_acc": held}, {}, {}, {}, more.get("failure", "")
    )


def test_the_validation_split_selects_and_the_fronts_compare_at_equal_clean_accuracy() -> None:
    """The candidate's held-out best is its first point, though the second is better on the test set."""
    cards = []
    for s in range(3):
        wobble = 0.002 * s
        cards += [
            card("base", "b=1", s, 0.80 + wobble, 0.30, 0.31),
            card("base", "b=6", s, 0.70 + wobble, 0.40, 0.41),
            card("ours", "w=1", s, 0.75 + wobble, 0.37 + wobble, 0.45),
            card("ours", "w=2", s, 0.75 + wobble, 0.50, 0.44),
            card("weak", "w=1", s, 0.90, 0.10, 0.10),
        ]
    settings = settings_of(cards)
    assert chosen(settings[2:4]).point == "w=1"
    ours, weak = verdicts(settings, "base", "PGD")
    assert ours.setting.point == "w=1"
    assert ours.robust.mean == pytest.approx(-0.03 + 0.002)  # against the baseline's best
    assert ours.equal_clean.mean == pytest.approx(0.02 + 0.002)  # its front has 0.35 there
    assert ours.dominated_by == "ours · w=2"
    assert ours.volume.mean > 0
    assert weak.equal_clean is None  # more clean accuracy than the baseline ever had
    assert weak.volume is None
    assert math.isnan(weak.holm_equal_clean)
    assert "at equal clean accuracy +2.2 points (ours · w=1, 3 seeds)" in headline([ours, weak], "base", "PGD")


def test_a_candidate_is_judged_against_the_base_that_it_adds_to() -> None:
    """As worse than TRADES as its own base is, it is better than that; a base that never finished is the baseline again."""
    cards = []
    for s in range(3):
        wobble = 0.002 * s
        cards += [
            card("base", "", s, 0.80, 0.40, 0.4),
            card("weak base", "b=1", s, 0.80, 0.20, 0.1),
            card("weak base", "b=2", s, 0.70, 0.30, 0.2),
            card("ours", "", s, 0.75, 0.28 + wobble, 0.3),
            card("lost base", "", s, 0, 0, 0, failure="diverged"),
            card("orphan", "", s, 0.70, 0.35, 0.3),
        ]
    settings = settings_of(cards)
    bases = {"ours": ["weak base"], "orphan": ["lost base"]}
    found = {v.setting.method: v for v in verdicts(settings, "base", "PGD", bases=bases)}
    ours = found["ours"]
    assert ours.base.label == "weak base · b=2"
    assert ours.robust.mean == pytest.approx(-0.018)  # against the chosen point of its base
    assert ours.equal_clean.mean == pytest.approx(0.032)  # halfway along the front of its base lies 0.25
    assert found["orphan"].base.method == found["weak base"].base.method == "base"
    # The better of both:
    both = verdicts(settings, "base", "PGD", bases={"ours": ["weak base", "base"]})
    assert next(v for v in both if v.setting.method == "ours").equal_clean.mean == pytest.approx(-0.118)
    forest = differences(list(found.values()), "base", "PGD")
    assert forest is not None
    assert forest.names == ("ours, against weak base", "orphan", "weak base · b=2")  # best first
    assert forest.middle == pytest.approx((3.2, -5, -10))
    test = stats.ttest_1samp([3.0, 3.2, 3.4], 0).confidence_interval()
    assert (forest.low[0], forest.high[0]) == pytest.approx((test.low, test.high))
    assert forest.texts[0] == f"+3.2 [{test.low:+.1f}, {test.high:+.1f}], 3 seeds"
    assert differences([replace(v, equal_clean=None) for v in found.values()], "base", "PGD") is None
    view = ablation_view(cards, "weak base", "PGD", "defended, best epoch", bases=bases)[0]
    (points,) = [chart for chart in view.charts if isinstance(chart, Scatter)]
    assert [points.names[i] for i in points.line] == ["weak base · b=2", "weak base · b=1"]  # from robust to clean
    assert points.named
    assert above_front(settings[3], by_method(settings)["weak base"], "PGD") == [
        pytest.approx(0.03 + 0.002 * s) for s in range(3)
    ]
    assert headline(list(found.values()), "base", "PGD").startswith("Against their bases, ")
    judged = verdict_table(list(found.values()), "PGD")
    assert [row[1] for row in judged.rows if row[0] == "ours"] == ["weak base · b=2"]
    table = accuracy_table(settings, baseline="base", attack="PGD")
    level = table.columns.index("PGD above base at equal clean")
    assert [(row[0], row[level]) for row in table.rows if row[2] == "3"] == [
        ("base", "–"),
        ("weak base", "-20.0 ± 0.0"),
        ("weak base", "-10.0 ± 0.0"),
        ("ours", "-11.8 ± 0.2"),
        ("orphan", "-5.0 ± 0.0"),
    ]


def test_measures_are_a_table_a_panel_and_a_row_a_method() -> None:
    layers = [f"cam/share/layer{i}" for i in range(12)]
    measured = {"pse/promotion": 0.1, "pse/gap": 0.2, "cam/similarity": 0.3, **dict.fromkeys(layers, 0.4)}
    cards = [replace(card("base", "", s, 0.8, 0.4, 0.4), measured=measured) for s in range(2)]
    cards.append(replace(card("ours", "", 0, 0.8, 0.4, 0.4), measured={"pse/gap": 0.5}))
    found = {table.title.rpartition(": ")[2]: table for table in measured_tables(settings_of(cards))}
    assert list(found) == ["pse", "cam", "cam/share"]
    assert found["pse"].columns == ("chosen setting", "promotion", "gap")
    assert found["pse"].rows == [("base", "0.100 ± 0.000", "0.200 ± 0.000"), ("ours", "–", "0.500")]
    assert found["cam/share"].columns[1:] == tuple(f"layer{i}" for i in range(12))


def test_beside_a_measure_stands_that_of_the_base_at_equal_clean_accuracy() -> None:
    cards = []
    for s in range(2):
        for method, point, clean, gap in (("base", "b=1", 0.8, 0.4), ("base", "b=6", 0.7, 0.2), ("ours", "", 0.775, 0.1)):
            cards.append(replace(card(method, point, s, clean, 0.4, 0.4), measured={"pse/gap": gap}))
        cards.append(replace(card("cleaner", "", s, 0.9, 0.4, 0.4), measured={"pse/gap": 0.3}))
    settings = settings_of(cards)
    (table,) = measured_tables(settings, verdicts(settings, "base", "PGD"))
    assert table.rows == [
        ("base · b=1", "0.400 ± 0.000"),
        ("ours", "0.100 ± 0.000 (0.350)"),  # three quarters of the way from b=6 to b=1
        ("cleaner", "0.300 ± 0.000"),  # the base was never as clean
    ]


def test_failures_are_shown_and_select_nothing() -> None:
    cards = [card("base", "", s, 0.8, 0.3, 0.3) for s in range(2)]
    cards += [card("ours", "w=1", 0, 0.9, 0.9, 0.9), card("ours", "w=1", 1, 0, 0, 0, failure="diverged")]
    cards += [card("ours", "w=2", s, 0.7, 0.2, 0.2) for s in range(2)]
    settings = settings_of(cards)
    assert chosen(settings[1:]).point == "w=2"  # the other did not finish every seed
    assert accuracy_table(settings).rows[1][2] == "1, 1 failed"


def test_the_bootstrap_of_the_table_is_that_of_the_images() -> None:
    generator = np.random.default_rng(0)
    right = {m: [generator.uniform(size=50) < rate for _ in range(3)] for m, rate in (("base", 0.4), ("ours", 0.7))}
    cards = [
        card(method, "", s, 0.9, rights[s].mean(), 0.5, correct={"PGD": rights[s]})
        for method, rights in right.items()
        for s in range(3)
    ]
    found = verdicts(settings_of(cards), "base", "PGD")[0]
    assert found.bootstrap == bootstrap_interval(right["ours"], right["base"])
    assert found.bootstrap[0] < found.robust.mean < found.bootstrap[1]


def test_a_card_whose_accuracy_is_not_that_of_its_images_is_refused(tmp_path: Path) -> None:
    right = np.array([True, False, False, True])
    write_record(card("ours", "", 0, 0.9, 0.5, 0.5, correct={"PGD": right}), tmp_path / "card.json")
    assert read_record(tmp_path / "card.json").evaluations["defended, best epoch"].accuracy["PGD"] == 0.5
    (tmp_path / "card.json").write_text((tmp_path / "card.json").read_text().replace('"PGD": 0.5', '"PGD": 0.6'))
    with pytest.raises(ValueError, match=r"the accuracy says 0.6000 under PGD, its images 0.5000"):
        read_record(tmp_path / "card.json")


def test_tables_as_text() -> None:
    table = Table("Δ & 50 %", ("a_b", "c|d"), [("x|y", float("nan")), ("{z}", 0.123456)])
    assert markdown(table).splitlines()[2:] == ["| a_b | c\\|d |", "| --- | ---: |", "| x\\|y | – |", "| {z} | 0.1235 |"]
    text = latex(table)
    assert r"a\_b & c|d \\" in text
    assert r"\{z\} & 0.1235 \\" in text
    assert text.startswith(r"% $\Delta$ \& 50 \%")
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert comma_separated(table) == "a_b,c|d\nx|y,\n{z},0.123456\n"


def test_parallel_coordinates_place_every_value_between_least_and_most() -> None:
    rows = np.array([[1.0, 5.0, 0.2], [3.0, np.nan, 0.2], [2.0, 7.0, 0.2]])
    figure = parallel_figure(["weight", "acc", "same"], rows, ["a", "a", "b"], "acc")
    lines = [line.get_ydata() for line in figure.axes[0].lines[:3]]
    np.testing.assert_allclose(lines, [[0, 0, 0.5], [1, np.nan, 0.5], [0.5, 1, 0.5]])
    assert {"1", "3", "5", "7"} <= {text.get_text() for text in figure.axes[0].texts}
    with pytest.raises(ValueError, match="colour_by: expected one of weight, acc, same; found 'cost'"):
        parallel_figure(["weight", "acc", "same"], rows, ["a", "a", "b"], "cost")


@pytest.mark.long
def test_flows_of_runs_share_one_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the dashboards drew at each run's last epoch, side by side; left out where the probe images differ."""
    folders = [make_run(tmp_path / name, [0.1, 0.6, 0.4], f"seed={i}") for i, name in enumerate(("one", "two", "other"))]
    for i, folder in enumerate(folders):
        info = {"what": "digits", "commit": "abc", "probe": "x" if i < 2 else "y"}
        (folder / "run.json").write_text(json.dumps(info))
        x = torch.rand(4, 1, 8, 8)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
        training = (torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
        obs = observe(net, x, (x + 0.2).clamp(0, 1), torch.arange(4) % 2)
        view = ProfilesPanel(per_class=2, points=2)(Probe(net, obs, (), tuple("abcd"), ("a", "b"), {}, training))
        ReportPage(folder / "report", folder.name).write_epoch(2, 2, {}, [view])
    command(monkeypatch, *folders, "--out", tmp_path / "page")
    views = read_script(tmp_path / "page" / "data" / "epoch_00000.js")["views"]
    charts = [chart for view in views for chart in view["charts"]]
    assert [chart["title"] for chart in charts if chart["type"] == "profiles"] == ["one", "two"]
    shared = next(chart for chart in charts if chart["title"].startswith("Attacked images on one axis, last epoch"))
    for name, series in zip(("one", "two"), shared["series"], strict=True):
        drawn = read_script(tmp_path / name / "report" / "data" / "epoch_00002.js")["views"][0]["charts"]
        assert series == next(chart for chart in drawn if chart["type"] == "lines")["series"][1]
    assert (tmp_path / "page" / "comparison.svg").read_text().count("<path") > 20


def test_weights_of_different_terms_are_different_axes() -> None:
    cards = [card("a", "kl.weight=2", 0, 0.9, 0.5, 0.5), card("b", "pse.weight=3, over=units", 0, 0.8, 0.6, 0.5)]
    names, rows, methods = _sweep(settings_of(cards), "PGD", "defended, best epoch")
    assert (names, methods) == (["kl.weight", "pse.weight", "clean", "PGD"], ["a", "b"])
    np.testing.assert_array_equal(rows, [[2, np.nan, 0.9, 0.5], [np.nan, 3, 0.8, 0.6]])


def test_an_interval_is_drawn_filled_where_it_is_without_0_and_cut_where_it_is_too_wide() -> None:
    nan = float("nan")
    names, low, high = ("sure", "not", "wide", "one"), (0.5, -0.5, -9.0, nan), (1.5, 1.5, 7.0, nan)
    chart = Intervals("Above", "points", names, (1.0, 0.5, -1.0, 0.2), low, high, ("a", "b", "c", "d"), 2.0)
    axes = intervals_figure(chart).axes[0]
    bars = {line.get_ydata()[0]: list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2}
    assert [bars[i] for i in range(3)] == [[0.5, 1.5], [-0.5, 1.5], [-2.0, 2.0]]
    marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert {(m.get_ydata()[0], m.get_marker()) for m in marks if m.get_marker() != "o"} == {(2, "<"), (2, ">")}
    dots = [m for m in marks if m.get_marker() == "o"]
    assert [float(m.get_xdata()[0]) for m in dots] == list(chart.middle)
    assert [m.get_markerfacecolor() == "white" for m in dots] == [False, True, True, True]
    assert [text.get_text() for text in axes.texts] == ["sure", "a", "not", "b", "wide", "c", "one", "d"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top


def test_thirty_methods_are_named_apart() -> None:
    """No name covers another, each method has a mark of its own, and the filled mark is the chosen setting."""
    means = np.random.default_rng(0).uniform(0.3, 0.6, (30, 3, 2))
    fronts = [Front(f"m{i}", mean, np.full((3, 2), np.nan), ("1", "2", "3"), 1) for i, mean in enumerate(means)]
    axes = fronts_figure(fronts, "PGD").axes[0]
    heights = [text.xyann[1] for text in axes.texts]
    assert len(heights) == 30
    assert 0 <= min(heights) <= max(heights) <= 1
    assert min(-np.diff(heights)) * axes.figure.get_figheight() * 72 > 7  # points: the size of the letters
    assert sorted(text.get_text() for text in axes.texts) == sorted(f"m{i} · 2" for i in range(30))
    assert {text.xy for text in axes.texts} == {tuple(100 * mean[1]) for mean in means}
    marks = {(line.get_color(), line.get_marker()) for line in axes.lines if len(line.get_xdata()) == 3}
    assert len(marks - {m for m in marks if m[1] == "None"}) >= 30


def test_measures_are_of_the_best_epoch_or_the_first_drawn_after_it(tmp_path: Path) -> None:
    """With probe.every_n_epochs=100 the first and the last are drawn; the first is of a net that has hardly learnt."""
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "run.json").write_text("{}")
    lines = ["epoch,step,val/robust_acc,health/pgd,pse/gap", "0,1,0.1,0.2,1", "1,2,0.4,0.5,", "2,3,0.3,0.5,3"]
    for rows, expected in ((lines, 3.0), ([*lines[:2], "1,2,0.4,0.5,2", lines[3]], 2.0), (lines[:3], 1.0)):
        (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
        assert record_of(tmp_path).measured["pse/gap"] == expected


HOSTILE = (
    *("<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://a/b.png)", "a|b", "`c`", "# head"),
    *("x\r\n\ny", "- b", "_a_ **b**", "&lt;"),
)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_in_markdown(name: str) -> None:
    """Read back by a Markdown parser: no HTML, link, picture, code or further cell, and the name as it was."""
    document = MarkdownIt("commonmark", {"html": True}).enable("table")
    text = markdown(Table(name, (name, "n"), [(name, 1.0)]))
    tokens = [inner for token in document.parse(text) for inner in [token, *(token.children or [])]]
    assert {token.type for token in tokens} & {"html_inline", "html_block", "link_open", "image", "code_inline"} == set()
    cells = [token.content for token in tokens if token.type == "inline"]
    assert len(cells) == 5  # title, two heads, two cells
    shown = "".join(token.content for token in tokens if token.type in ("text", "text_special") or token.type == "softbreak")
    assert shown.count(" ".join(name.split())) == 3


@pytest.mark.parametrize("cell", ["=1+1", "+1+cmd|' /C calc'!A0", "@SUM(A1)", "-2+x()", "\t=1", " =1", "\n=1"])
def test_a_spreadsheet_finds_no_formula(cell: str) -> None:
    read = [*csv.reader(io.StringIO(comma_separated(Table("t", ("name", cell), [(cell, -1.5)])), newline=""))]
    assert read[0][1] == read[1][0] == f"'{cell}"
    assert read[1][1] == "-1.5"


def test_numbers_with_intervals_stay_numbers_in_csv() -> None:
    assert comma_separated(Table("t", ("a",), [("+0.4 [+0.1, +2.0]",), ("−1.2 ± 0.3 %",)])).splitlines()[1:] == [
        '"+0.4 [+0.1, +2.0]"',
        "−1.2 ± 0.3 %",
    ]


def test_latex_has_no_further_line_or_command() -> None:
    text = latex(Table("a\nb\\input{x}", ("c\n\\end{tabular}",), [("d\r\ne%",)]))
    assert text.splitlines()[0] == r"% a b\textbackslash{}input\{x\}"
    assert r"c \textbackslash{}end\{tabular\} \\" in text
    assert r"d e\% \\" in text


def test_no_text_turns_what_is_read_or_commands_a_terminal() -> None:
    table = Table("a\u202eb", ("c\x1b[2Jd",), [("e\u2066f\x07",)])
    for text in (markdown(table), latex(table), comma_separated(table)):
        assert not set(text) & set("\u202e\u2066\x1b\x07")


def test_pictures_replace_links(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    for name in ("a.png", "a.svg"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
        save(intervals_figure(Intervals("t", "x", ("a",), (0.1,), (0.0,), (0.2,), ("0.1",), 0.3)), tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "theirs").read_text() == "theirs"
