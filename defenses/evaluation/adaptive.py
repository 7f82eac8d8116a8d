"""The attack that knows the defense: it moves the image for the classifier's loss and for what the defense watches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.objectives import Objective, Targeted
from glassarmor.defenses.attacks.pgd import PGD, Value
from glassarmor.defenses.options import require_number
from glassarmor.defenses.threat import Threat
from glassarmor.defenses.training.terms import Term
from glassarmor.interpret.observation import feature_layers, find_layers, observe


class AdaptivePGD(PGD):
    """PGD whose objective is  J(x') + weight · Σ_i w_i · term_i(x, x'),  w_i the weight of a term at the end of its ramp.

    Our use of an adaptive attack (Tramèr et al. 2020): a defense that trains on terms has to be judged by whoever knows
    them.  Both signs mean something.  A positive weight raises what the defense held down: with the training weights, J +
    Σ is the very loss that was minimised, so this looks for what training left over.  A negative weight keeps the terms
    small: adversarial images that the defense's own signals do not show.  Report the worse of both.

    Forwards per call: those of PGD, + 1 clean pass that all steps share, + 1 if a term leaves its layers to be
    chosen.  Terms that need slopes cost a second-order gradient a step.

    Args:
        threat, steps, step_size, start, restarts, objective, seed: as in :class:`.PGD`.
        terms: by name, e.g. the regularisers of a defense.  They are copied; running estimates come along as they are at
            the call if the terms were prepared, and start as in a first epoch if not.
        weight: of all terms together, of either sign; 0 is plain PGD, bit for bit.

    Raises:
        ValueError: as PGD, and a weight that is no finite number.
    """

    def __init__(
        self,
        threat: Threat,
        terms: Mapping[str, Term],
        weight: float = 1.0,
        steps: int = 20,
        step_size: str | float | None = None,
        start: Literal["uniform", "gaussian", "none"] = "uniform",
        restarts: int = 1,
        objective: Objective | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat, steps, step_size, start, restarts, objective, seed)
        require_number("attack.weight", weight, "(-inf, inf)")
        self.weight = weight
        weights = {name: weight * term.weight_at(float("inf")) for name, term in terms.items()}
        self.weights = {name: value for name, value in weights.items() if value != 0}
        self.terms = {name: terms[name] for name in self.weights}

    def _lightened(self, net: nn.Module, x: Tensor) -> AbstractContextManager[nn.Module]:
        # Terms may read a convolution's own output.
        return nullcontext(net) if self.terms else super()._lightened(net, x)

    def _value(self, net: nn.Module, x: Tensor, y: Tensor) -> Value:
        if not self.terms:
            return super()._value(net, x, y)
        terms = {name: copy.deepcopy(term).eval() for name, term in self.terms.items()}
        features = () if all(term.layers for term in terms.values()) else feature_layers(net, x)
        for name, term in terms.items():
            find_layers(net, term.layers, key=f"attack.terms.{name}.layers")
        layers = tuple(dict.fromkeys([*features, *(layer for term in terms.values() for layer in term.layers)]))
        clean = observe(net, x, x, y, layers=layers)
        for name, term in terms.items():
            term.prepare(clean, features)
            learned = self.terms[name].state_dict()
            if learned:
                term.load_state_dict(learned)
        second_order = any(term.needs_graph for term in terms.values())
        watched = tuple(dict.fromkeys(layer for term in terms.values() for layer in term.layers))
        target = self.objective.target(y, clean.clean.logits.shape[1]) if isinstance(self.objective, Targeted) else None

        def value(x_adv: Tensor) -> tuple[Tensor, Tensor]:
            # Slopes are gradients, which a score taken under no_grad needs too.
            with torch.set_grad_enabled(torch.is_grad_enabled() or second_order):
                obs = observe(net, x, x_adv, y, target=target, layers=watched, clean=False, create_graph=second_order)
                obs = replace(obs, clean_pass=clean.clean)
                total = self.objective(obs.adv.logits, y, clean.clean.logits)
                for name, term in terms.items():
                    total = total + self.weights[name] * term(obs)
            return obs.adv.logits, total

        return value
