"""A defense is data: an attack and named, weighted terms that all read one observation of what it did."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defenses.attacks import Attack
from defenses.terms import Term
from interpret.modes import evaluating, undisturbed
from interpret.observation import Observation, feature_layers, find_layers, observe


@dataclass(frozen=True)
class StepOutput:
    """``loss`` to minimise; by term its mean value (detached) and its weight now; the observation they all read."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    weights: Mapping[str, float]
    obs: Observation


class Defense(nn.Module):
    """Robust training loss: ``defense(net, x, y)`` attacks, observes once, and sums the weighted terms.

    Forwards per call, in passes over the batch: those of the attack, 1 at x', and 1 at x if any live term reads it.
    Where the base loss reads x, both run as one joined batch, with and without regularisers.

    Args:
        attack: makes x'; None trains on clean images.
        loss: the base loss by name of its terms, e.g. TRADES = {"clean_ce": CleanCE(), "kl": TradesKL(6)}.
        regularizers: more terms, by name.

    Raises:
        ValueError: no base loss, a name used twice, or a term that needs an attack without one.
    """

    def __init__(
        self,
        attack: Attack | None,
        loss: Mapping[str, Term],
        regularizers: Mapping[str, Term] | None = None,
    ) -> None:
        super().__init__()
        regularizers = regularizers or {}
        twice = set(loss) & set(regularizers)
        if twice:
            raise ValueError(f"regularizers: {', '.join(sorted(twice))} is a term of the base loss too; rename it")
        self.attack = attack
        live = {name: term for name, term in {**loss, **regularizers}.items() if not term.absent}
        if not any(name in live for name in loss):
            raise ValueError("defense.loss: expected at least one term with a weight other than 0, found none")
        for name, term in live.items():
            if attack is None and term.needs_attack:
                group = "regularizers" if name in regularizers else "defense.loss"
                raise ValueError(
                    f"{group}.{name}: compares clean and adversarial images, but this defense has no attack; "
                    "choose e.g. defense=pgd_at or defense=trades"
                )
        self.terms = nn.ModuleDict(live)
        self.joined = any(term.needs_clean for name, term in live.items() if name in loss)
        self.needs_clean = any(term.needs_clean for term in live.values())
        self.needs_graph = any(term.needs_graph for term in live.values())
        self.regularizer_names = tuple(name for name in live if name in regularizers)
        self.epoch = 0.0
        self.prepared = False

    def named_terms(self) -> dict[str, Term]:
        return {name: term for name, term in self.terms.items() if isinstance(term, Term)}

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers that a term observes, each once."""
        return tuple(dict.fromkeys(layer for term in self.named_terms().values() for layer in term.layers))

    def prepare(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        """Resolve and check every layer on a few images, before any training; the net is left as it was.

        Without it the first batch does so; call it yourself where a checkpoint is to be loaded, whose running estimates
        need a place.

        Raises:
            ValueError: a layer that does not exist, stays silent, or does not suit its term; a loss that is not finite.
        """
        for name, term in self.named_terms().items():
            if term.layers:
                find_layers(net, term.layers, key=f"regularizers.{name}.layers")
        chooses = [name for name in self.regularizer_names if not self.named_terms()[name].layers]
        features: tuple[str, ...] = ()
        if chooses:
            try:
                features = feature_layers(net, x)
            except ValueError as error:
                raise ValueError(f"regularizers.{chooses[0]}.{error}") from None
        layers = tuple(dict.fromkeys([*features, *self.layers]))
        with undisturbed(net):
            obs = observe(net, x, x.clone(), y, layers=layers)
        for term in self.named_terms().values():
            term.prepare(obs, features)
        self.prepared = True
        attack, self.attack = self.attack, copy.copy(self.attack)  # the real one keeps its place among its random draws
        try:
            with undisturbed(net), evaluating(self):  # a rehearsal: what fails, fails here
                loss = self(net, x, y).loss.detach()
        finally:
            self.attack = attack
        if not torch.isfinite(loss):
            raise ValueError(f"defense: expected a finite loss on the first images, found {float(loss)}")

    def at(self, epoch: float, step: int) -> None:
        """Tell ramps the epoch and the attack the step, so that a resumed run repeats an uninterrupted one."""
        self.epoch = epoch
        if self.attack is not None:
            self.attack.reseed(step)

    def end_epoch(self) -> None:
        """After the last batch of an epoch, on every process: running estimates become next epoch's weights."""
        for term in self.named_terms().values():
            term.end_epoch()

    def signal_gap(self, net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, tuple[float, float]]:
        """By regulariser, its mean value in eval mode and how much more it is under batch statistics, as in training.

        A large gap says that what is trained on is not what the deployed net does.  The net and the running estimates
        are left as they were.
        """
        values: dict[str, list[float]] = {name: [] for name in self.regularizer_names}
        with undisturbed(net), evaluating(self):
            for training in (False, True):
                net.train(training)
                obs = observe(net, x, x_adv, y, layers=self.layers, joined=self.joined)
                for name, found in values.items():
                    found.append(float(self.named_terms()[name](obs).detach().mean()))
        return {name: (in_eval, in_training - in_eval) for name, (in_eval, in_training) in values.items()}

    def forward(self, net: nn.Module, x: Tensor, y: Tensor) -> StepOutput:
        """One step's loss.

        Args:
            net: in the mode it trains in; maps images in [0,1], (N, C, H, W), to logits (N, K).
            x, y: a batch; x (N, C, H, W) in [0,1], y (N,) int64.
        """
        if not self.prepared:
            self.prepare(net, x[:2], y[:2])
        x_adv = x if self.attack is None else self.attack(net, x, y)
        learning = torch.is_grad_enabled()
        with torch.set_grad_enabled(learning or self.needs_graph):
            obs = observe(
                net,
                x,
                x_adv,
                y,
                layers=self.layers,
                clean=self.needs_clean,
                joined=self.joined,
                create_graph=self.needs_graph and learning,
            )
        loss = torch.zeros((), device=x.device)
        values: dict[str, Tensor] = {}
        weights = {name: term.weight_at(self.epoch) for name, term in self.named_terms().items()}
        for name, term in self.named_terms().items():
            weight = weights[name]
            # At weight 0 a ramped term only keeps its running estimates warm.
            with torch.set_grad_enabled(learning and weight != 0):
                value = term(obs).mean()
            values[name] = value.detach()
            if weight != 0:
                loss = loss + weight * value
        return StepOutput(loss, values, weights, obs)
