"""Advice on planted numbers: it names what was planted, proposes what composes, and keeps silent where little speaks."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glassarmor.interpret.profiles.advice import FEWEST, Advice, advise
from glassarmor.interpret.signals.pse import PromotionSuppression
from glassarmor.interpret.signals.sensitivity import SensitivityControl
from tests.composing import config
from tests.reference.nets import seeded

LAYERS = ("stage1", "stage2", "stage3")
UNITS = 32


def turns(counts: tuple[int, ...], never: int = 4) -> Tensor:
    """How many examples turn at each layer."""
    return torch.cat([torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)), torch.full((never,), -1)])


def effects(n: int, carriers: tuple[int, ...] = (3, 7), gain: float = 1.0, spread: float = 0.1) -> PromotionSuppression:
    """Units ``carriers`` gain ``gain`` in promotion and half as much in suppression; all others nothing but noise."""
    promotion = torch.randn(n, UNITS, generator=seeded(1)) * spread
    suppression = torch.randn(n, UNITS, generator=seeded(2)) * spread
    promotion[:, list(carriers)] += gain
    suppression[:, list(carriers)] += gain / 2
    return PromotionSuppression(promotion, suppression, promotion.sum(1), suppression.sum(1))


def control(attack: float = 3.0, noise: float = 1.0, calm: tuple[int, ...] = ()) -> SensitivityControl:
    """All units move alike, but those of ``calm`` move less than under noise."""
    moved = torch.full((UNITS,), attack)
    moved[list(calm)] = noise / 2
    return SensitivityControl(moved, moved, 0 * moved, torch.full((UNITS,), noise), torch.zeros(UNITS, dtype=torch.bool))


def given(turning: Tensor, *, layer: str = "stage2", active: dict[str, float] | None = None, masking: str = "",
          controls: SensitivityControl | None = None, unit_effects: PromotionSuppression | None = None
          ) -> tuple[Advice, ...]:  # fmt: skip
    shown = unit_effects or effects(len(turning))
    return advise(LAYERS, turning, {layer: controls or control()}, {layer: shown}, active, masking)


def test_what_was_planted_is_found_and_the_words_compose():
    masking = "masking.layer={layer} masking.units={units}"
    where, carriers, noise, hold, mask, effect = given(turns((2, 30, 4)), masking=masking)
    assert where.sentence.startswith(
        "The attack wins at stage2: 30 of the 36 examples that turn do so there (83 %, at least"
    )
    assert 1 / 3 < where.numbers["share_low"] < 30 / 36
    assert where.numbers["share"] == pytest.approx(30 / 36)
    assert where.numbers["examples"] == 40
    assert carriers.units == (3, 7) or carriers.units == (7, 3)
    assert carriers.layer == "stage2"
    assert carriers.numbers["promotion"] == pytest.approx(2, abs=0.1)
    assert carriers.numbers["suppression"] == pytest.approx(1, abs=0.1)
    assert 0.5 <= carriers.numbers["share"] <= 1
    assert (noise.numbers["ratio"], noise.numbers["beyond"], noise.numbers["judged"]) == (3, 2, 2)
    assert noise.config == where.config == carriers.config == ""
    cfg = config(*hold.config.split())
    assert list(cfg.regularizers) == ["sensitivity"]
    assert cfg.regularizers.sensitivity.layers == ["stage2"]
    assert set(mask.units) == {3, 7}
    assert mask.config == f"masking.layer=stage2 masking.units=[{mask.units[0]},{mask.units[1]}]"
    cfg = config(*effect.config.split())
    assert cfg.regularizers.pse.layers == ["stage2"]
    assert cfg.regularizers.pse.top == pytest.approx(2 / UNITS, abs=0.005)


def test_every_number_in_a_sentence_is_among_those_given():
    """As it is, as a percentage or rounded; names of layers and the units listed aside."""
    for turning in (turns((2, 30, 4)), turns((3, 3, 3)), turns((1, 2, 0))):
        for active in ({}, {"sensitivity": 0.1, "pse": 0.5}):
            for advice in given(turning, active=active, masking="masking.units={units}"):
                text = re.sub(r"units? [\d, ]+(and \d+ more)?\.?$|stage\d", "", advice.sentence)
                known = {float(f"{factor * value:.{digits}f}")
                         for value in advice.numbers.values() for factor in (1, 100) for digits in (0, 1, 2)}  # fmt: skip
                known |= {FEWEST, len(LAYERS), *(float(f"{v:g}") for v in advice.numbers.values())}
                for number in re.findall(r"\d+(?:\.\d+)?", text):
                    assert float(number) in known, (number, advice)


def test_few_turns_say_nothing():
    (only,) = given(turns((0, FEWEST - 1, 0)))
    assert only.sentence.startswith("Only 7 of 11 examples turn, too few to say where")
    assert only.config == only.layer == ""
    assert len(given(turns((0, FEWEST, 0)))) > 1
    (more,) = advise(LAYERS, turns((0, 3, 0)), {}, {}, more="images=128")
    assert more.config == "images=128"  # the way to learn more
    (none,) = given(turns((0, 0, 0)))
    assert none.numbers == {"examples": 4, "turned": 0}


def test_turns_all_over_the_net_name_no_layer():
    where, spread = given(turns((10, 14, 12)))
    assert "no one place" in where.sentence
    assert where.config == ""
    assert spread.numbers["ratio"] == 3
    cfg = config(*spread.config.split())
    assert cfg.regularizers.sensitivity.at == "turning"  # a regulariser that needs no one place
    (_, kept) = given(turns((10, 14, 12)), active={"pse": 0.5, "sensitivity": 0.1})
    assert kept.config == "regularizers.sensitivity.at=turning"
    assert len(given(turns((10, 14, 12)), controls=control(1.1, 1.0))) == 1  # noise does as much


def test_units_that_gain_by_chance_are_not_named():
    found = given(turns((2, 30, 4)), unit_effects=effects(40, carriers=(), spread=1.0))
    assert "not clear" in found[1].sentence
    assert found[1].units == ()
    assert "The units of stage2 move" in found[2].sentence  # the layer is still judged, as a whole
    assert found[2].numbers["judged"] == UNITS
    assert [advice.config.split()[0] for advice in found if advice.config] == ["regularizers=[sensitivity]"]


def test_only_examples_that_turn_there_count():
    turning = turns((2, 30, 4))
    mixed = effects(40)
    away = turning != 1
    mixed.promotion[away] = 0
    mixed.promotion[away, 20] = 100.0
    assert set(given(turning, unit_effects=mixed)[1].units) == {3, 7}


def test_movement_like_noise_is_no_reason_to_hold_still():
    found = given(turns((2, 30, 4)), controls=control(1.1, 1.0), masking="m={units}")
    assert "hardly more than noise" in found[2].sentence
    assert not any("sensitivity" in advice.config or advice.config.startswith("m=") for advice in found)
    assert any("pse" in advice.config for advice in found)  # their effect on the margin is another matter


def test_units_that_noise_moves_as_far_are_not_masked():
    found = given(turns((2, 30, 4)), controls=control(calm=(7,)), masking="m={units}")
    assert [advice.config for advice in found if advice.config.startswith("m=")] == ["m=[3]"]


def test_regularisers_in_use_are_kept_or_raised():
    found = given(turns((2, 30, 4)), active={"pse": 0.5})
    hold, effect = [advice for advice in found if advice.config]
    cfg = config(*hold.config.split())
    assert list(cfg.regularizers) == ["pse", "sensitivity"]
    assert effect.numbers["proposed"] == 1.0
    cfg = config(*effect.config.split())
    assert cfg.regularizers.pse.weight == 1.0
    found = given(turns((2, 30, 4)), active={"sensitivity": 0.1, "pse": 0.5})
    cfg = config(*found[3].config.split())
    assert cfg.regularizers.sensitivity.weight == 0.2
    assert cfg.regularizers.sensitivity.layers == ["stage2"]


def test_names_of_nested_layers_compose():
    found = advise(("layer1.0", "layer2.1"), turns((30, 1)), {"layer1.0": control()}, {"layer1.0": effects(35)})
    for advice in found:
        if "sensitivity" in advice.config:
            assert config(*advice.config.split()).regularizers.sensitivity.layers == ["layer1.0"]
            break
    else:
        pytest.fail("no advice")


def test_a_gain_spread_over_many_units_asks_for_all_of_them():
    wide = effects(40, carriers=tuple(range(30)))
    last = given(turns((2, 30, 4)), unit_effects=wide)[-1]
    assert "on all units of this layer" in last.sentence
    assert "top" not in last.config


def test_layers_that_were_not_measured_are_left_out():
    assert len(advise(LAYERS, turns((2, 30, 4)), {}, {})) == 1


def test_effects_of_other_examples():
    with pytest.raises(ValueError, match="effects: expected 40 examples, as in turning, found 3"):
        given(turns((2, 30, 4)), unit_effects=effects(3))


def test_effects_that_still_hold_a_graph():
    live = effects(40)
    live = replace(live, promotion=live.promotion.requires_grad_() * 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(given(turns((2, 30, 4)), unit_effects=live)[1].units) == {3, 7}
