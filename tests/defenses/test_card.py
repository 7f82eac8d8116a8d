"""The result card: what it says is what was measured, it follows its schema, and what does not compare is said."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from glassarmor.defenses.evaluation.card import SCHEMA, accuracy_curve, check_card, differences, make_card, read_card
from glassarmor.defenses.evaluation.fingerprint import described
from glassarmor.defenses.evaluation.robustness import evaluate_robustness
from glassarmor.defenses.evaluation.sampling import wilson
from glassarmor.defenses.evaluation.sanity import Check, SanityReport
from glassarmor.defenses.evaluation.suite import make_suite
from glassarmor.defenses.threat import L2, Linf
from glassarmor.interpret.views.charts import Lines
from glassarmor.lightning_modules.cards.compare import cards_tables, cards_view, headline, level_with_the_best, paired_images
from glassarmor.lightning_modules.cards.markdown import markdown, settings_of
from glassarmor.lightning_modules.commands import study as compare

SCALES = (0.5, 1.0, 2.0)


def threshold_net() -> nn.Module:
    """Two classes: the first pixel above or below ½, so that an image falls as soon as ε exceeds its distance from ½."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[-10.0, 0, 0, 0], [10.0, 0, 0, 0]]))
        net[1].bias.copy_(torch.tensor([5.0, -5.0]))
    return net.eval()


DISTANCE = torch.tensor([0.03, 0.07, 0.15, 0.4, 0.45, 0.3, 0.06, 0.2])
Y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def images() -> torch.Tensor:
    x = torch.full((8, 1, 2, 2), 0.5)
    x[:, 0, 0, 0] += torch.where(Y == 1, DISTANCE, -DISTANCE)
    return x


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    net, x, threat = threshold_net(), images(), Linf(0.1)
    found = evaluate_robustness(net, x, Y, threat, "probe")
    sanity = SanityReport((Check("losses agree", True, 0.0, "≤ 5 %", "they | do"),), {"PGD-20": 0.5}, 8)
    return make_card(
        found,
        threat,
        model={"name": "threshold", "source": "by hand", "parameters": 10},
        data={"name": "lines", "split": "test", "selection": "nothing"},
        class_names=("dark", "light"),
        curve=accuracy_curve(net, x, Y, threat, SCALES),
        sanity=sanity,
        interpretation={"pse/promotion": 0.25, "cam/interpretability": math.nan},
        seed=0,
        versions={"torch": "2"},
        commit="abc",
    )


def test_the_card_says_what_a_closed_form_says(card: dict[str, Any]) -> None:
    accuracy = card["accuracy"]
    assert accuracy["clean"] == 1
    assert accuracy["robust"] == float((DISTANCE > 0.1).float().mean()) == 5 / 8
    assert [(row["class"], row["n"], row["clean"], row["robust"]) for row in accuracy["by_class"]] == [
        ("dark", 4, 1.0, 0.5),
        ("light", 4, 1.0, 0.75),
    ]
    expected = [(0.0, 1.0), *((0.1 * s, float((0.1 * s < DISTANCE).float().mean())) for s in SCALES)]
    for point, (eps, share) in zip(accuracy["by_eps"], expected, strict=True):
        assert (point["eps"], point["robust"]) == pytest.approx((eps, share))
    assert card["examples"]["standing"] == (DISTANCE > 0.1).tolist()
    assert card["examples"]["felled_by"].count("PGD-20") == 3
    assert card["interpretation"] == {"pse/promotion": 0.25}, "what is no number is left out, not written as null"


def test_the_curve_never_rises_and_leaves_the_net_alone() -> None:
    net, threat = threshold_net().train(), L2(0.1)
    before = copy.deepcopy(net.state_dict())
    curve = accuracy_curve(net, images(), Y, threat, (0.1, 1, 3, 100, 200), batch=3)
    values = [value for _, value in curve]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0, "with nothing left to attack, too"
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match=r"scales: expected increasing numbers above 0, found \(1, 1\)"):
        accuracy_curve(net, images(), Y, threat, (1, 1))


def test_the_file_is_read_back_and_what_is_no_card_is_refused(card: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(card, allow_nan=False), encoding="utf-8")
    assert read_card(path) == card
    with pytest.raises(ValueError, match=r"card: .* does not exist"):
        read_card(tmp_path / "none.json")
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"card: the whole: .*required property"):
        read_card(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("accuracy", "robust"), 101),
        (("threat", "norm"), "L7"),
        (("sanity", "verdict"), "fine"),
        (("examples", "standing"), [1, 0]),
        (("data", "images"), "somewhere"),
    ],
)
def test_the_schema_refuses_what_is_wrong_and_names_the_place(card: dict[str, Any], place, value) -> None:
    wrong = copy.deepcopy(card)
    wrong[place[0]][place[1]] = value
    with pytest.raises(ValueError, match="/".join(place)):
        check_card(wrong)


def test_the_schema_is_one() -> None:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text(encoding="utf-8")))


def test_only_cards_about_the_same_question_compare(card: dict[str, Any]) -> None:
    other = copy.deepcopy(card)
    assert differences(card, other) == []
    other["threat"]["eps"], other["data"]["images"] = 0.2, "0" * 16
    told = "; ".join(differences(card, other))
    assert "ε 0.1 and 0.2" in told
    assert "images" in told


def test_markdown_holds_the_numbers_and_stays_a_table(card: dict[str, Any]) -> None:
    text = markdown(card)
    assert "**62.50 %** robust accuracy against Linf ε = 0.1" in text
    assert "**trusted**" in text
    assert "they \\| do" in text
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in rows}) <= 1


def test_markdown_tells_the_settings_of_each_attack(card: dict[str, Any]) -> None:
    text = markdown(card)
    assert "| PGD-20 | PGD, steps 20, step size 0.0125, start uniform, restarts 1, objective CrossEntropy, seed 0 |" in text
    told = {
        step.name: settings_of(described(step.attack))
        for step in make_suite("adaptive", Linf(0.1), 10, 3, None, nn.Flatten()).steps
    }
    assert told["APGD-T"] == "apgd-t of AutoAttack's standard version, seed 3"
    assert told["APGD margin, 5 starts"] == "APGD, steps 100, restarts 5, objective Margin, seed 3"
    assert settings_of(described(make_suite("fast", Linf(0.1), 10, 3).steps[1].attack)) == (
        "APGDT, steps 50, restarts 1, seed 3, targets 9, loss dlr"
    )
    assert told["transfer, CE"] == "Transfer of APGD, steps 100, restarts 1, objective CrossEntropy, seed 3"
    assert told["Square"] == "square of AutoAttack's standard version, queries 5000, seed 3"
    first = make_suite("standard", Linf(0.1), 10).steps[0]
    assert settings_of(described(first.attack)) == "apgd-ce of AutoAttack's standard version, seed 0"


def saved(folder: Path, name: str, card: dict[str, Any], standing: list[bool]) -> Path:
    """A card of the same images on which other images stand, and all that follows from them."""
    other = copy.deepcopy(card)
    other["model"]["name"], n = name, len(standing)
    other["examples"] |= {"standing": standing, "felled_by": [None if stands else "PGD-20" for stands in standing]}
    other["accuracy"] |= {"robust": sum(standing) / n, "interval95": list(wilson(sum(standing), n))}
    other["suite"]["attacks"][0] |= {"felled": n - sum(standing), "accuracy": sum(standing) / n}
    for label, row in enumerate(other["accuracy"]["by_class"]):
        mine = [stands for stands, y in zip(standing, other["examples"]["labels"], strict=True) if y == label]
        row["robust"] = sum(mine) / len(mine)
    path = folder / name / "card.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(other), encoding="utf-8")
    return path


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, as one line."""
    return " ".join(capsys.readouterr().out.split())


def standing_card(card: dict[str, Any], standing: list[bool], verdict: str = "trusted") -> dict[str, Any]:
    other = copy.deepcopy(card)
    other["examples"]["standing"], other["accuracy"]["robust"] = standing, sum(standing) / len(standing)
    other["sanity"] |= {"verdict": verdict, "reasons": [] if verdict == "trusted" else ["gradients are zero"]}
    return other


def test_only_networks_that_the_images_tell_apart_are_ranked(card: dict[str, Any]) -> None:
    """McNemar's exact p: 2/2^10 for ten images all won, 1 for as many won as lost; ×3 by Holm where three are compared."""
    some = standing_card(card, [True] * 10 + [False] * 10)
    other = standing_card(card, [False] * 10 + [True] * 10)
    least = standing_card(card, [False] * 20)
    assert headline({"a": some, "b": least}) == "a (50.0 %) withstands most; behind it b (0.0 %)."
    assert headline({"b": least, "a": some}) == "a (50.0 %) withstands most; behind it b (0.0 %)."
    tied = headline({"a": some, "b": other, "c": least})
    assert tied.startswith("No network withstands most: these images do not tell a (50.0 %), b (50.0 %) apart (p ≥ 1.00)")
    assert tied.endswith("; behind them c (0.0 %).")
    assert "No network withstands most" in headline({"a": some, "b": some}), "equal everywhere"
    # Six images won give p = 2/2^6 = 0.031: enough for a pair, not for the best of three.
    six = standing_card(card, [True] * 6 + [False] * 14)
    assert headline({"a": six, "c": least}).startswith("a (30.0 %) withstands most")
    three = level_with_the_best({"a": six, "b": least, "c": least})
    assert three == {"a": 1.0, "b": pytest.approx(3 * 2 / 2**6), "c": pytest.approx(3 * 2 / 2**6)}


def test_what_is_not_trusted_is_listed_apart_with_its_reason(card: dict[str, Any]) -> None:
    best = standing_card(card, [True] * 20, "invalid")
    some, least = standing_card(card, [True] * 10 + [False] * 10), standing_card(card, [False] * 20)
    found = headline({"masked": best, "a": some, "b": least})
    assert found.startswith("a (50.0 %) withstands most; behind it b (0.0 %). Not ranked")
    assert found.endswith("not to be believed yet: masked (100.0 %): invalid.")
    ranked, apart = cards_tables({"masked": best, "a": some, "b": least})
    assert [row[0] for row in ranked.rows] == ["a", "b"]
    assert ranked.rows[1][4:7] == ("0", "10", "0.002"), "differences are to the first trusted card, not to the first"
    assert [tuple(row[:3]) for row in apart.rows] == [("masked", "invalid", "gradients are zero")]
    assert headline({"masked": best, "a": some}).startswith("Only a (50.0 %) is trusted. Not ranked")
    assert headline({"masked": best, "other": best}).startswith("No card is trusted, so that nothing is ranked.")
    view = cards_view({"masked": best, "a": some})
    lines = next(chart for chart in view.charts if isinstance(chart, Lines))
    assert lines.labels == ("masked (invalid)", "a")


def test_long_names_stay_apart_in_the_terminal(
    card: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{'-'.join(['pgd_at_with_a_long_name'] * 3)}-seed-{seed}" for seed in (0, 1)]
    cards = [saved(tmp_path, name, card, [True] * 6 + [False] * 2) for name in names]
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, cards), "--out", str(tmp_path / "page")])
    compare.run()
    out = capsys.readouterr().out
    column = "".join(line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│"))
    assert column == "".join(names)
    assert "…" not in out


def test_cards_beside_each_other_are_compared_image_by_image(
    card: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = saved(tmp_path, "one", card, [True] * 6 + [False] * 2)
    two = saved(tmp_path, "two", card, [False] * 5 + [True] * 3)
    lost, won, p = paired_images(read_card(one), read_card(two))
    assert (lost, won) == (5, 2)
    assert p == pytest.approx(2 * sum(math.comb(7, k) for k in range(3)) / 2**7)  # the exact binomial, both tails
    monkeypatch.setattr(sys, "argv", ["compare.py", str(one), str(two), "--out", str(tmp_path / "page")])
    compare.run()
    assert "these images do not tell one (75.0 %), two (37.5 %) apart (p ≥ 0.45)" in told(capsys)
    assert (tmp_path / "page" / "index.html").stat().st_size > 10_000
    wrong = json.loads(two.read_text())
    wrong["threat"]["eps"] = wrong["suite"]["attacks"][0]["settings"]["threat"]["eps"] = 0.3
    for point in wrong["accuracy"]["by_eps"]:
        point["eps"] *= 3
    two.write_text(json.dumps(wrong))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(one), str(two), "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit):
        compare.run()
    assert "do not compare: ε 0.1 and 0.3" in capsys.readouterr().err
