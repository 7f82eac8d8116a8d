"""Advice: what the measured numbers say about where an attack wins, and what to try (ours).

Each sentence is computed from numbers that it carries along, with the words that do it on the command line.  Where the
evidence is weak it says so and proposes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glassarmor.interpret.signals.pse import PromotionSuppression
from glassarmor.interpret.signals.sensitivity import SensitivityControl

FEWEST: Final = 8  # examples that must turn before their layers are counted
Z: Final = 2.58  # standard errors: one false alarm in a hundred
CARRIED: Final = 0.5  # the units named carry this share of what the attack gains
FEW: Final = 0.25  # up to this share of a layer's units the gain counts as held by few
CLEARLY: Final = 1.2  # times the noise control: what counts as more than noise


@dataclass(frozen=True)
class Advice:
    """One sentence, the numbers in it by name, and the words for the command line ("" if there is nothing to do).

    ``units``: those of ``layer`` that the sentence is about.
    """

    sentence: str
    numbers: Mapping[str, float]
    config: str = ""
    layer: str = ""
    units: tuple[int, ...] = ()


@torch.no_grad()
def advise(
    layers: Sequence[str],
    turning: Tensor,
    controls: Mapping[str, SensitivityControl],
    effects: Mapping[str, PromotionSuppression],
    active: Mapping[str, float] | None = None,
    masking: str = "",
    more: str = "",
) -> tuple[Advice, ...]:
    """Where the turn happens, what carries it there, whether that is more than noise, and what to try, in this order.

    Args:
        layers: those of the profile, in execution order.
        turning: index into ``layers`` of each example, −1 where it does not turn, (N,).
        controls: by layer, from :func:`.sensitivity_control`.
        effects: by layer and unit, (N, C), from :func:`.unit_effects` on the same examples.
        active: name → weight of the regularisers in use.
        masking: words that mask units, with ``{layer}`` and ``{units}`` in them; "" if there is no way to.
        more: words that look at more examples, proposed where these are too few to say anything; "" if there are no more.

    Raises:
        ValueError: effects of another number of examples than ``turning``.
    """
    active = active or {}
    where = _where(layers, turning, more)
    if not where.layer:
        spread = _wherever(controls, active) if where.numbers["turned"] >= FEWEST else None
        return (where,) if spread is None else (where, spread)
    found = [where]
    layer = where.layer
    carried = None
    if layer in effects:
        carried = _carriers(layer, effects[layer], turning == layers.index(layer))
        found.append(carried)
    if layer in controls:
        noise = _beyond_noise(layer, controls[layer], carried.units if carried else ())
        found.append(noise)
        if noise.numbers["ratio"] >= CLEARLY:
            found.append(_regularise(layer, noise.numbers["ratio"], active))
            if masking and carried and carried.units:
                found.append(_mask(carried, controls[layer], masking))
    if carried and carried.units:
        found.append(_unit_effect(carried, effects[layer].margin.shape[1], active))
    return tuple(found)


def _where(layers: Sequence[str], turning: Tensor, more: str) -> Advice:
    turned, examples = int((turning >= 0).sum()), len(turning)
    numbers: dict[str, float] = {"examples": examples, "turned": turned}
    if turned < FEWEST:
        text = f"Only {turned} of {examples} examples turn, too few to say where ({FEWEST} are needed)."
        return Advice(text + (" Look at more of them." if more else ""), numbers, more if turned else "")
    counts = torch.bincount(turning[turning >= 0], minlength=len(layers))
    first = int(counts.argmax())
    share, low, even = int(counts[first]) / turned, _lower_bound(int(counts[first]), turned), 1 / len(layers)
    numbers |= {"turned_there": int(counts[first]), "share": share, "share_low": low, "even_share": even}
    if low <= even:
        text = f"The turn has no one place: {layers[first]} holds most, {_percent(share)} of {turned} turns, where an even "
        text += f"spread over {len(layers)} layers gives {_percent(even)}; that may be chance."
        return Advice(text, numbers, more)
    text = f"The attack wins at {layers[first]}: {int(counts[first])} of the {turned} examples that turn do so there "
    text += f"({_percent(share)}, at least {_percent(low)}; {examples} were shown)."
    return Advice(text, numbers, layer=layers[first])


def _carriers(layer: str, effects: PromotionSuppression, there: Tensor) -> Advice:
    """The fewest units that carry half of the margin gained on the examples that turn there."""
    if len(effects.margin) != len(there):
        raise ValueError(f"effects: expected {len(there)} examples, as in turning, found {len(effects.margin)}")
    margin = effects.margin[there].double()
    mean = margin.mean(0)
    error = margin.std(0, correction=1) / len(margin) ** 0.5 if len(margin) > 1 else torch.full_like(mean, torch.inf)
    gain, count = mean.clamp_min(0), mean.numel()
    order = gain.argsort(descending=True, stable=True)
    needed = int((gain[order].cumsum(0) < CARRIED * gain.sum()).sum()) + 1
    named = order[:needed]
    sure = named[mean[named] > Z * error[named]]
    numbers = {
        "turned_there": float(there.sum()),
        "units": float(count),
        "gain": float(gain.sum()),
        "needed": float(needed),
        "sure": float(len(sure)),
        "share": float(gain[sure].sum() / gain.sum().clamp_min(1e-12)),
        "promotion": float(effects.promotion[there][:, sure].double().sum(1).mean()),
        "suppression": float(effects.suppression[there][:, sure].double().sum(1).mean()),
    }
    if 2 * len(sure) < needed or numbers["gain"] <= 0:
        text = f"Which units carry the turn is not clear: of the {needed} of {count} units of {layer} with the largest "
        text += f"gain only {len(sure)} gain margin beyond chance over {int(there.sum())} examples."
        return Advice(text, numbers, layer=layer)
    text = f"{len(sure)} of the {count} units of {layer} carry {_percent(numbers['share'])} of the margin gained there, "
    text += f"{numbers['promotion']:+.2f} logits by promotion and {numbers['suppression']:+.2f} by suppression an example: "
    return Advice(text + f"{_units(sure)}.", numbers, layer=layer, units=tuple(sure.tolist()))


def _beyond_noise(layer: str, control: SensitivityControl, units: Sequence[int]) -> Advice:
    """The units that carry the turn, or else all that are not silent, beside noise of equal norm."""
    judged = torch.tensor(units, dtype=torch.long) if units else (~control.silent).nonzero()[:, 0]
    attack, noise = float(control.attack[judged].mean()), float(control.noise[judged].mean())
    beyond = int(control.attack_sensitive[judged].sum())
    ratio = attack / max(noise, 1e-12)
    numbers = {"attack": attack, "noise": noise, "ratio": ratio, "beyond": float(beyond), "judged": float(len(judged))}
    who = "These units" if units else f"The units of {layer}"
    text = f"{who} move {attack:.2f} σ under attack and {noise:.2f} σ under noise of equal norm ({ratio:.1f} times); "
    text += f"{beyond} of {len(judged)} move farther than under noise."
    if ratio < CLEARLY:
        text += " That is hardly more than noise does: damping their movement would damp what any change of the image does."
    return Advice(text, numbers, layer=layer, units=tuple(units))


def _regularise(layer: str, ratio: float, active: Mapping[str, float]) -> Advice:
    numbers = {"ratio": ratio}
    if "sensitivity" not in active:
        text = f"Try to hold {layer} still: the sensitivity regulariser on this layer, where the attack moves units "
        config = f"{_with('sensitivity', active)} regularizers.sensitivity.layers=[{layer}]"
        return Advice(text + f"{ratio:.1f} times as far as noise.", numbers, config, layer)
    weight = active["sensitivity"]
    numbers |= {"weight": weight, "proposed": 2 * weight}
    text = f"The sensitivity regulariser is on, with weight {weight:g}, and {layer} still moves {ratio:.1f} times as far "
    config = f"regularizers.sensitivity.layers=[{layer}] regularizers.sensitivity.weight={2 * weight:g}"
    return Advice(text + f"as under noise: try it on this layer alone, with weight {2 * weight:g}.", numbers, config, layer)


def _wherever(controls: Mapping[str, SensitivityControl], active: Mapping[str, float]) -> Advice | None:
    """For turns that have no one place: the regulariser that goes by where predictions turn; None if noise does as much."""
    if not controls:
        return None
    attack = sum(float(c.attack.mean()) for c in controls.values())
    noise = sum(float(c.noise.mean()) for c in controls.values())
    ratio = attack / max(noise, 1e-12)
    if ratio < CLEARLY:
        return None
    text = f"Over all layers units move {ratio:.1f} times as far under attack as under noise: try to hold layers still "
    text += "by how often predictions turn there, which needs no one place."
    words = "" if "sensitivity" in active else f"{_with('sensitivity', active)} "
    return Advice(text, {"ratio": ratio}, f"{words}regularizers.sensitivity.at=turning")


def _unit_effect(carried: Advice, count: int, active: Mapping[str, float]) -> Advice:
    """Few units: penalise the largest effects alone; many: all of them."""
    share = len(carried.units) / count
    numbers = {"share_of_units": share, "share_of_gain": carried.numbers["share"]}
    few = share <= FEW
    how = f"the largest {_percent(share)} of the effects" if few else "all units"
    words = f" regularizers.pse.top={max(share, 0.01):.2f}" if few else ""
    text = f"{_percent(numbers['share_of_gain'])} of the gain sits in {_percent(share)} of the units of {carried.layer}: "
    if "pse" in active:
        weight = active["pse"]
        numbers |= {"weight": weight, "proposed": 2 * weight}
        text += f"the promotion–suppression regulariser is on, with weight {weight:g}; "
        text += f"try {2 * weight:g} on {how} of this layer."
        config = f"regularizers.pse.layers=[{carried.layer}] regularizers.pse.weight={2 * weight:g}{words}"
    else:
        text += f"try the promotion–suppression regulariser on {how} of this layer."
        config = f"{_with('pse', active)} regularizers.pse.layers=[{carried.layer}]{words}"
    return Advice(text, numbers, config, carried.layer, carried.units)


def _mask(carried: Advice, control: SensitivityControl, masking: str) -> Advice:
    """Those carriers that the attack moves more than noise does: a mask on others would cost accuracy for nothing."""
    units = [unit for unit in carried.units if bool(control.attack_sensitive[unit])]
    numbers = {"masked": float(len(units)), "carriers": float(len(carried.units))}
    if not units:
        return Advice(f"No unit of {carried.layer} that carries the turn is worth masking.", numbers, layer=carried.layer)
    text = f"Or mask the {len(units)} of these {len(carried.units)} units that the attack moves farther than noise does, "
    text += "and see whether robust accuracy rises by more than clean accuracy falls."
    config = masking.format(layer=carried.layer, units=f"[{','.join(map(str, units))}]")
    return Advice(text, numbers, config, carried.layer, tuple(units))


def _with(name: str, active: Mapping[str, float]) -> str:
    return f"regularizers=[{','.join([*active, name])}]"


def _lower_bound(hits: int, of: int) -> float:
    """Lower end of Wilson's interval for a share, at ``Z`` standard errors."""
    share, z2 = hits / of, Z**2
    return (share + z2 / (2 * of) - Z * (share * (1 - share) / of + z2 / (4 * of**2)) ** 0.5) / (1 + z2 / of)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _units(units: Tensor, most: int = 8) -> str:
    listed = ", ".join(map(str, units[:most].tolist()))
    return f"unit{'s' if len(units) > 1 else ''} {listed}" + (f" and {len(units) - most} more" if len(units) > most else "")
