"""A race: who is in which round follows from held-out accuracies in the cards alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from glassarmor.lightning_modules.study.members import Member, members_of
from glassarmor.lightning_modules.study.race import Race, Round, race, race_table, rounds_of, score
from glassarmor.lightning_modules.study.records import RunRecord
from glassarmor.lightning_modules.study.study import Study

ROUNDS = ({"seeds": 1, "settings": "middle", "keep": 2}, {"seeds": 1, "keep": 1}, {"seeds": 3, "settings": "chosen"})
BASE = {"a=1": (0.6, 0.2), "a=2": (0.5, 0.3), "a=3": (0.4, 0.36)}


def study(**changes: Any) -> Study:
    methods = {
        "base": {"grid": {"x.a": [1, 2, 3]}},
        "bad": {"overrides": ["m=1"], "grid": {"x.a": [1, 2, 3]}},
        "good": {"overrides": ["m=2"], "grid": {"x.a": [1, 2, 3]}},
        "fair": {"overrides": ["m=3"], "grid": {"x.a": [1, 2, 3]}},
    }
    return Study(**{"name": "s", "seeds": (7, 8, 9), "baseline": "base", "methods": methods, "rounds": ROUNDS, **changes})


def everyone(of: Study) -> list[Member]:
    return members_of(of, lambda overrides, seed: {"line": list(overrides), "seed": seed})


def card(member: Member, clean: float, robust: float, failure: str = "") -> RunRecord:
    held_out = {} if failure else {"val/clean_acc": clean, "val/robust_acc": robust}
    return RunRecord(
        member.name, member.method, member.setting, member.seed, member.hash, {}, {}, held_out, {}, {}, {}, failure
    )


def reached(member: Member) -> RunRecord:
    """The base has its front at every seed; "good" lies 3 points above it, "fair" 1 point, "bad" 5 below."""
    clean, robust = BASE[member.setting.replace("x.", "")]
    return card(member, clean, robust + {"base": 0, "bad": -0.05, "good": 0.03, "fair": 0.01}[member.method])


def run(of: Study, known: Sequence[RunRecord]) -> Race:
    members = everyone(of)
    return race(of, members, known, {m.name for m in members} - {c.name for c in known})


def shown(found: Race) -> dict[str, list[tuple[str, int]]]:
    named: dict[str, list[tuple[str, int]]] = {}
    for member in found.members:
        named.setdefault(member.method, []).append((member.setting[-1], member.seed))
    return named


def test_round_by_round_few_settings_then_all_then_seeds() -> None:
    of = study()
    all_points = [("1", 7), ("2", 7), ("3", 7)]
    first = run(of, [])
    middle = [("2", 7)]
    assert shown(first) == {"base": all_points, "bad": middle, "good": middle, "fair": middle}
    assert first.scores == []
    known = [reached(m) for m in first.members]
    assert run(of, known[:-1]).scores == []  # the round is not over
    second = run(of, known)
    assert shown(second) == {
        "base": all_points,
        "bad": middle,
        "good": [("2", 7), ("1", 7), ("3", 7)],
        "fair": shown(second)["good"],
    }
    assert list(second.scores[0]) == ["good", "fair", "bad"]
    assert second.scores[0] == pytest.approx({"good": 0.03, "fair": 0.01, "bad": -0.05})
    known = [reached(m) for m in second.members]
    third = run(of, known)
    # The best held-out robust accuracy of "good" is at 3; the base is trained whole at the new seeds.
    assert shown(third)["good"][3:] == [("3", 8), ("3", 9)]
    assert shown(third)["base"] == [(a, seed) for seed in (7, 8, 9) for a in "123"] or sorted(
        shown(third)["base"]
    ) == sorted((a, seed) for seed in (7, 8, 9) for a in "123")
    assert shown(third)["fair"] == shown(second)["fair"]
    last = run(of, [reached(m) for m in third.members])
    assert len(last.scores) == 3
    assert last.members == third.members
    rows = race_table(last, rounds_of(of)).rows
    assert [tuple(row) for row in rows] == [
        ("good", "+3.0", "+3.0", "+3.0", "finished"),
        ("fair", "+1.0", "+1.0", "–", "out after round 2"),
        ("bad", "-5.0", "–", "–", "out after round 1"),
    ]


def test_a_candidate_is_judged_against_its_own_base_which_is_trained_while_it_is_in() -> None:
    methods: Mapping[str, Any] = {
        **study().methods,
        "strong": {"overrides": ["m=4"], "grid": {"x.a": [1, 2, 3]}},
        "on strong": {"overrides": ["m=5"], "base": "strong", "grid": {"x.a": [1, 2, 3]}},
    }
    of = study(methods=methods)
    gains = {"base": 0, "bad": -0.05, "good": 0.03, "fair": 0.01, "strong": 0.2, "on strong": 0.18}

    def result(member: Member) -> RunRecord:
        clean, robust = BASE[member.setting.replace("x.", "")]
        return card(member, clean, robust + gains[member.method])

    first = run(of, [])
    assert len(shown(first)["strong"]) == 3
    second = run(of, [result(m) for m in first.members])
    assert second.scores[0]["on strong"] == pytest.approx(-0.02)  # however far above the front of "base"
    assert "strong" not in second.scores[0]  # a base does not race
    third = run(of, [result(m) for m in second.members])
    last = run(of, [result(m) for m in third.members])
    assert len(shown(last)["strong"]) == 3  # its candidate is out: no further seeds


def test_what_never_finished_is_last_and_what_is_cleaner_than_the_base_is_not_lost() -> None:
    of = study()
    first = run(of, [])
    cards = [reached(m) if m.method != "good" else card(m, 0, 0, "diverged") for m in first.members]
    after = run(of, cards)
    assert list(after.scores[0])[-1] == "good"
    assert math.isnan(after.scores[0]["good"])
    base = [reached(m) for m in first.members if m.method == "base"]
    one = next(m for m in first.members if m.method == "fair")
    assert score("fair", ["base"], [*base, card(one, 0.7, 0.25)]) == pytest.approx(0.05)  # against (0.6, 0.2)
    assert score("fair", ["base"], [*base, card(one, 0.45, 0.33)]) == pytest.approx(0.0)  # half way between two points
    assert score("fair", ["base"], [*base, card(one, 0.1, 0.33)]) == pytest.approx(-0.03)  # against its most robust point
    assert score("fair", ["none", "base"], [*base, card(one, 0.1, 0.33)]) == pytest.approx(-0.03)
    assert math.isnan(score("fair", ["none"], [*base, card(one, 0.1, 0.33)]))


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        (({"keep": 3},), r"study.rounds\[0\]: expected seeds"),
        (({"seeds": 1, "epochs": 3},), r"study.rounds\[0\]: expected seeds, and perhaps settings and keep; found"),
        (("all",), r"study.rounds\[0\]"),
        (({"seeds": 4},), r"study.rounds\[0\].seeds: expected a whole number from 1 to 3, found 4"),
        (({"seeds": 1, "settings": "chosen"},), r"study.rounds\[0\].settings: expected one of middle, all; found 'chosen'"),
        (({"seeds": 3, "keep": "x"},), r"study.rounds\[0\].keep: expected how many candidates go on, >= 1; found 'x'"),
        (({"seeds": 1}, {"seeds": 3}), r"study.rounds\[0\].keep: expected how many candidates go on, >= 1; found None"),
    ],
)
def test_what_rounds_must_not_say(rounds: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rounds_of(study(rounds=rounds))
    assert rounds_of(study())[-1] == Round(3, "chosen")
    assert rounds_of(study(rounds=())) == ()
