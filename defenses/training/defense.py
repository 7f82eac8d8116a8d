"""A defense is data: an attack and named, weighted terms that all read one observation of what it did."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.free import Free
from glassarmor.defenses.attacks.pgd import Attack, Scalable
from glassarmor.defenses.options import require_one_of
from glassarmor.defenses.training.compiling import Compiled, ways
from glassarmor.defenses.training.terms import Ramp, Term, at_epoch
from glassarmor.defenses.training.weights import AWP, moved
from glassarmor.interpret.inputs import checked
from glassarmor.interpret.modes import batchnorm_as_found, evaluating, replaying, rng_state, undisturbed
from glassarmor.interpret.observation import Observation, feature_layers, find_layers, observe

Passes = Literal["auto", "joined", "shared", "separate"]


@dataclass(frozen=True)
class StepOutput:
    """``loss`` to minimise; by term its mean value (detached) and its weight now; the observation they all read."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    weights: Mapping[str, float]
    obs: Observation


class Defense(nn.Module):
    """Robust training loss: ``defense(net, x, y)`` attacks, observes once, and sums the weighted terms.

    Forwards per call, in passes over the batch: those of the attack, 1 at x', 1 at x if any live term reads it, the
    ``extra_passes`` of live terms, and with AWP those of the base loss once more.

    Args:
        attack: makes x'; None trains on clean images.
        loss: the base loss by name of its terms, e.g. TRADES = {"clean_ce": CleanCE(), "kl": TradesKL(6)}.
        regularizers: more terms, by name.
        awp: adversarial weight perturbation against the base loss at the same x'.
        passes: where both x and x' are read, how BatchNorm sees them. "joined": one batch [x; x']; "shared": the pass over x
            takes the statistics of x' and updates nothing; "separate": each its own, as most published codes, which hides
            channel shifts from regularisers and is refused with them.  "auto" is joined where the base loss reads x, with
            and without regularisers, else shared.
        attack_batchnorm: the statistics that the attack sees: "running", or "batch", as some published codes do.
        eps_share: of the attack's ε in training, a number or a ramp over epochs, e.g. a warm-up; its steps shrink with it.
        step_share: of the attack's step size, likewise.
        compile_attack: how ``torch.compile`` treats the net that the attack sees in training, e.g. "inductor", or
            "reduce-overhead" for CUDA graphs too (:func:`.ways`); None leaves it as it is.  Everything
            else sees the net itself.  ``benchmarks/recommend.py`` measures whether it pays.

    Raises:
        ValueError: no base loss, a name used twice, a term that needs an attack without one, or options that make no
            sense together; the message says why.
    """

    def __init__(
        self,
        attack: Attack | None,
        loss: Mapping[str, Term],
        regularizers: Mapping[str, Term] | None = None,
        *,
        awp: AWP | None = None,
        passes: Passes = "auto",
        attack_batchnorm: Literal["running", "batch"] = "running",
        eps_share: float | Ramp = 1.0,
        step_share: float | Ramp = 1.0,
        compile_attack: str | None = None,
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
        self.regularizer_names = tuple(name for name in live if name in regularizers)
        reads_clean = any(term.needs_clean for name, term in live.items() if name in loss)
        self.passes = ("joined" if reads_clean else "shared") if passes == "auto" else passes
        self.awp = awp if awp is not None and awp.gamma > 0 else None
        self.attack_batchnorm = attack_batchnorm
        self.eps_share, self.step_share = eps_share, step_share
        self.compile_attack = compile_attack
        self._compiled: list[nn.Module] = []  # the net and its wrapper; in a list, for it is no part of the defense
        self._refuse(reads_clean)
        self.epoch = 0.0
        self.prepared = False

    def _refuse(self, reads_clean: bool) -> None:
        """Options that are unknown, or make no sense together."""
        for key, value, allowed in (
            ("passes", self.passes, get_args(Passes)),
            ("attack_batchnorm", self.attack_batchnorm, ("running", "batch")),
        ):
            require_one_of(f"defense.{key}", value, allowed)
        compared = [name for name in self.regularizer_names if self.named_terms()[name].needs_clean]
        if self.passes == "separate" and compared:
            raise ValueError(
                f"defense.passes: regularizers.{compared[0]} compares x and x', and separate passes normalise them apart, "
                "which hides every channel shift; expected auto, joined or shared"
            )
        shares = {"eps_share": self.eps_share, "step_share": self.step_share}
        for key, share in shares.items():
            for end in (share.start, share.end) if isinstance(share, Ramp) else (share,):
                if not isinstance(end, int | float) or not 0 <= end <= 1:
                    raise ValueError(f"defense.{key}: expected a share in [0, 1] or a Ramp of shares, found {end!r}")
        for key, used in (
            *((key, share != 1) for key, share in shares.items()),
            ("attack_batchnorm", self.attack_batchnorm != "running"),
            ("awp", self.awp is not None),
            ("compile_attack", self.compile_attack is not None),
        ):
            if used and self.attack is None:
                where = "awp.gamma" if key == "awp" else f"defense.{key}"
                raise ValueError(f"{where}: is about the adversarial loss, but this defense has no attack")
        scheduled = [key for key, share in shares.items() if share != 1]
        if scheduled and not isinstance(self.attack, Scalable):
            raise ValueError(
                f"defense.{scheduled[0]}: {type(self.attack).__name__} has no ball and steps that could follow a schedule; "
                "expected PGD or one of its one-step kin"
            )
        if self.compile_attack is not None:
            if self.compile_attack not in ways():
                raise ValueError(
                    f"defense.compile_attack: expected null or one of {', '.join(ways())}; found {self.compile_attack!r}"
                )
            if self.attack_batchnorm != "running" or isinstance(self.attack, Free):
                raise ValueError("defense.compile_attack: needs an attack that makes passes, and attack_batchnorm=running")
        if isinstance(self.attack, Free):
            if reads_clean:
                raise ValueError(
                    "defense.loss: Free-AT takes δ's gradient from the loss itself, which must be one of x' alone, such as "
                    "AdversarialCE; a distance to the clean prediction has no gradient where δ starts, at 0"
                )
            if self.attack_batchnorm != "running":
                raise ValueError("defense.attack_batchnorm: Free-AT's attack makes no pass of its own; expected running")

    def named_terms(self) -> dict[str, Term]:
        return {name: term for name, term in self.terms.items() if isinstance(term, Term)}

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers that a term observes, each once."""
        return tuple(dict.fromkeys(layer for term in self.named_terms().values() for layer in term.layers))

    @property
    def replays(self) -> int:
        """How many times in a row each batch wants to be trained on."""
        return self.attack.replays if isinstance(self.attack, Free) else 1

    def prepare(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        """Resolve and check every layer on a few images, before any training; the net is left as it was.

        Without it the first batch does so; call it yourself where a checkpoint is to be loaded, whose running estimates
        need a place.

        Raises:
            ValueError: a layer that does not exist, stays silent, or does not suit its term; a loss that is not finite; a
                net in training mode of which nothing learns.
        """
        if net.training and torch.is_grad_enabled():
            require_learning(net)
        for name, term in self.named_terms().items():
            if term.layers:
                find_layers(net, term.layers, key=f"regularizers.{name}.layers")
        regularizers = {name: self.named_terms()[name] for name in self.regularizer_names}
        chooses = [name for name, term in regularizers.items() if term.looks_inside and not term.layers]
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
        """Tell ramps the epoch, attack and terms the step, so that a resumed run repeats an uninterrupted one."""
        self.epoch = epoch
        if self.attack is not None:
            self.attack.reseed(step)
        for term in self.named_terms().values():
            term.reseed(step)

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
                obs = observe(net, x, x_adv, y, layers=self.layers, joined=self.passes == "joined")
                for name, found in values.items():
                    found.append(float(self.named_terms()[name](obs).detach().mean()))
        return {name: (in_eval, in_training - in_eval) for name, (in_eval, in_training) in values.items()}

    def forward(self, net: nn.Module, x: Tensor, y: Tensor) -> StepOutput:
        """One step's loss.

        Args:
            net: in the mode it trains in; maps images in [0,1], (N, C, H, W), to logits (N, K).
            x, y: a batch; x (N, C, H, W) in [0,1], y (N,) int64.

        Under ``torch.no_grad`` and ``torch.inference_mode``, where Lightning validates and tests, the value is the same.
        """
        if torch.is_inference_mode_enabled():  # no attack and no signal without gradients; copies can have them
            with torch.inference_mode(False), torch.no_grad():
                return self(net, x.clone(), y.clone())
        x, y, _ = checked(net, x, y, numbers=False)
        if not self.prepared:
            self.prepare(net, x[:2], y[:2])
        x_adv = x if self.attack is None else self._attacked(net, x, y)
        shifts: dict[nn.Parameter, Tensor] = {}
        if self.awp is not None and self.epoch >= self.awp.warmup and torch.is_grad_enabled():
            base = {name: term for name, term in self.named_terms().items() if name not in self.regularizer_names}
            # The masks of the pass that follows, and no running estimate is fed twice.
            with replaying(rng_state(x.device), x.device), evaluating(self):
                shifts = self.awp.shifts(net, lambda: self._step(net, x, x_adv.detach(), y, base).loss)
        with moved(net, shifts):
            return self._step(net, x, x_adv, y, self.named_terms())

    def _attacked(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = self.attack
        assert attack is not None
        net = self._compiled_for(net)
        eps, step = at_epoch(self.eps_share, self.epoch), at_epoch(self.step_share, self.epoch)
        with batchnorm_as_found(net) if self.attack_batchnorm == "batch" else nullcontext():
            if eps == step == 1:
                return attack(net, x, y)
            assert isinstance(attack, Scalable)
            twin = attack.scaled(eps, step)
            x_adv = twin(net, x, y)
            attack.calls = twin.calls
            return x_adv

    def _compiled_for(self, net: nn.Module) -> nn.Module:
        """What the attack sees: in training, the compiled net if that was asked for.  It shares modules and weights."""
        if self.compile_attack is None or not self.training:
            return net
        if not self._compiled or self._compiled[0] is not net:
            self._compiled = [net, Compiled(net, self.compile_attack)]
        return self._compiled[1]

    def _step(self, net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, terms: Mapping[str, Term]) -> StepOutput:
        """Observe once for these terms, and sum them."""
        learning = torch.is_grad_enabled()
        needs_graph = any(term.needs_graph for term in terms.values())
        with torch.set_grad_enabled(learning or needs_graph):
            obs = observe(
                net,
                x,
                x_adv,
                y,
                layers=tuple(dict.fromkeys(layer for term in terms.values() for layer in term.layers)),
                clean=any(term.needs_clean for term in terms.values()),
                joined=self.passes == "joined",
                separate=self.passes == "separate",
                create_graph=needs_graph and learning,
            )
        loss = torch.zeros((), device=x.device)
        values: dict[str, Tensor] = {}
        weights = {name: term.weight_at(self.epoch) for name, term in terms.items()}
        for name, term in terms.items():
            weight = weights[name]
            if weight == 0 and term.extra_passes:  # nothing to keep warm, and its passes cost
                values[name] = torch.zeros((), device=x.device)
                continue
            # At weight 0 a ramped term only keeps its running estimates warm.
            with torch.set_grad_enabled(learning and weight != 0):
                value = term(obs).mean()
            values[name] = value.detach()
            if weight != 0:
                loss = loss + weight * value
        return StepOutput(loss, values, weights, obs)


def require_learning(net: nn.Module, found: str = "net: found") -> None:
    """Raises ValueError where no parameter of the net asks for a gradient."""
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError(f"{found} nothing that learns; expected at least one parameter that is not frozen")
