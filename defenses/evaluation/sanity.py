"""Can a robust accuracy measured by gradient attacks be trusted?  Checks, each with its figure, and a verdict (ours).

After Athalye et al. 2018 (1802.00420), Carlini et al. 2019 (1902.06705) and Tramèr et al. 2020 (2002.08347): a defense that
hides its gradients looks robust to attacks that follow them.

**Verdict.**  Invalid: a check was broken by so much that the number cannot be used (its ``grave``).  Suspicious: a check
failed.  Trusted: none did.

**Tolerance.**  Most figures are a share of the n images: those that attack A turned and B, which should be at least as
strong, left standing.  A share of few images proves little, so what is compared with the tolerance is the lower limit of its
exact one-sided 99 % interval (Clopper and Pearson 1934): a check fails only when even that is above the first number of
``LIMITS``, and is grave above the second.  With 256 images, a tolerance of 1 % is broken by 8 of them.  The tolerances were
fixed before they judged the networks of ``docs/findings.md``, and held on digits nets of other seeds (10 to 12).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Literal

import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from glassarmor.defenses import losses
from glassarmor.defenses.attacks.draws import Seeded
from glassarmor.defenses.attacks.objectives import CrossEntropy, Margin, Objective
from glassarmor.defenses.attacks.pgd import FGSM, PGD, Attack
from glassarmor.defenses.attacks.square import Square
from glassarmor.defenses.evaluation.gradient import (
    Reachable,
    gradient_error,
    largest_jump,
    rounding,
    watched,
    zero_gradients,
)
from glassarmor.defenses.evaluation.inputs import as_images
from glassarmor.defenses.evaluation.sampling import luck
from glassarmor.defenses.threat import Threat
from glassarmor.interpret.inputs import answer, borrowed, checked
from glassarmor.interpret.modes import answering, undisturbed
from glassarmor.interpret.network.chunks import measuring

Verdict = Literal["trusted", "suspicious", "invalid"]
LIMITS: Final[dict[str, tuple[float, float]]] = {  # share of images: above it suspicious, above it invalid
    "PGD ≥ FGSM": (0.01, 0.05),
    "enough steps": (0.01, 0.2),
    "enough restarts": (0.02, 0.2),
    "losses agree": (0.05, 0.15),
    "scale of the logits": (0.05, 0.15),
    "success grows with ε": (0.01, 0.05),
    "nothing withstands a large ε": (0.01, 0.05),
    "gradients beat noise": (0.01, 0.05),
    "gradients beat Square": (0.01, 0.05),
    "gradients beat transfer": (0.01, 0.05),
    "gradients are not zero": (0.01, 0.1),
    "gradient is the slope": (0.05, 0.05),
    "outputs do not jump": (0.0, 1.0),  # one jump is a proof; never grave, for the number may still be right
    "suite against the checks": (0.01, 0.1),
}
CONFIDENCE: Final = 0.99
LUCK: Final = (0.01, 0.05)  # of guessers as lucky: more are suspicious, more make the number that of a guesser
LARGE: Final = 16.0
SAME: Final = 0.01  # difference of two passes, in standard deviations of the logits: TF32 alone makes a thousandth
SLOPE: Final = (0.01, 0.1)  # of the slope's energy that a gradient may miss; that makes it a wrong gradient
ALONE: Final = 8  # images run one by one
JUMP: Final = 0.01  # in standard deviations of the logits; what a continuous net shows is 2/10000 at most
ROUNDED: Final = 16  # roundings of a net that computes in bf16 or fp16, by which its logits may jump and passes differ
ROUNDED_SLOPE: Final = (0.05, 0.1)
FAR: Final = 1e9  # for a difference that is no number
JUMPS: Final = 16  # images whose ball is searched for jumps
SUREST: Final = 8  # images that a softmax has to answer in the same way when it is surest
SLOPES: Final = 32  # images whose gradient is compared with finite differences
LONG: Final = 128  # images that get more steps and more starts


@dataclass(frozen=True)
class Check:
    """One question that an honest network answers with yes.

    ``figure``: what was measured, its unit in ``sentence``; ``expected``: what it should be, in words; ``grave``: the number
    cannot be used.
    """

    name: str
    passed: bool
    figure: float
    expected: str
    sentence: str
    grave: bool = False


@dataclass(frozen=True)
class SanityReport:
    """All checks, what follows from them, and the accuracies on the way, in [0,1]; clean alone if nothing was attacked.

    standing: by image, whether it is rightly classified and withstands every attack of the checks.
    """

    checks: tuple[Check, ...]
    accuracy: dict[str, float] = field(default_factory=dict)
    images: int = 0
    standing: tuple[bool, ...] = ()

    @property
    def verdict(self) -> Verdict:
        if any(check.grave for check in self.checks):
            return "invalid"
        return "trusted" if all(check.passed for check in self.checks) else "suspicious"

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of the checks that failed, the grave ones first."""
        failed = [check for check in self.checks if not check.passed]
        return tuple(check.sentence for check in sorted(failed, key=lambda check: not check.grave))


def lower_limit(count: int, n: int) -> float:
    """Lower limit of the exact one-sided 99 % interval of a share seen as ``count`` of ``n``."""
    return float(betaincinv(count, n - count + 1, 1 - CONFIDENCE)) if count else 0.0


def share_check(name: str, count: int, n: int, what: str, gravely: int | None = None) -> Check:
    """A check of ``LIMITS`` from ``count`` of ``n`` images, of which ``what`` says something.

    ``gravely``: those of them that count for the second limit, where not all do.
    """
    allowed, broken = LIMITS[name]
    low = lower_limit(count, n)
    grave = lower_limit(count if gravely is None else gravely, n) > broken
    sentence = f"{count} of {n} images {what} ({100 * count / n:.1f} %, at least {100 * low:.1f} %)"
    return Check(name, low <= allowed, count / n, f"≤ {100 * allowed:g} %, lower 99 % limit", sentence, grave)


def suite_check(held: Tensor, report: SanityReport) -> Check:
    """Whether a suite was at least as strong as the attacks of the checks: image by image, not by how many fell to each.

    held: which of the images of the report withstand the suite, (N,) bool.
    """
    fallen = int((held.cpu() & ~torch.tensor(report.standing)).sum())
    words = "withstand the suite and fall in the checks"
    return share_check("suite against the checks", fallen, report.images, words)


def finite_check(count: int, n: int) -> Check:
    """Whether the net answered all images with numbers: ``count`` of ``n`` it did not."""
    sentence = f"{count} of {n} images have logits that are not finite" if count else "the logits of all images are finite"
    return Check("logits are finite", not count, float(count), "all", sentence, grave=count > 0)


def _varied(logits: Tensor) -> Check:
    values = logits.double().nan_to_num(FAR)
    spread = float((values.amax(0) - values.amin(0)).max())
    constant = spread <= 1e-6 * float(values.abs().max())
    found = "all images have the same logits" if constant else "the logits depend on the image"
    return Check("outputs depend on the image", not constant, spread, "they do", found, grave=constant)


def guess_check(chance: float, right: int, n: int, answers: int) -> Check:
    """Whether the net knows anything: ``right`` of ``n`` images, which a guesser reaches with probability ``chance``.

    answers: how many classes the net answers at all.  A net that answers one is right on images of that class alone, and
    withstands every attack there.
    """
    known, grave = chance <= LUCK[0] and answers > 1, chance > LUCK[1] or answers < 2
    sentence = f"{right} of {n} images are classified rightly"
    if answers < 2:
        sentence += ", no better than guessing: all images get one and the same answer"
    elif not known:
        sentence += f", no better than guessing: {100 * chance:.2g} % of guessers reach that"
    else:
        sentence += f"; {100 * chance:.2g} % of guessers reach that"
    return Check("better than guessing", known, chance, f"≤ {100 * LUCK[0]:g} % of guessers as good", sentence, grave)


class ScaledCrossEntropy:
    """−log p_y of the logits over the distance of their two largest, which is held fixed: never saturated (ours)."""

    needs_clean: ClassVar[bool] = False

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        top = logits.detach().float().topk(2, 1).values
        gap = (top[:, :1] - top[:, 1:]).clamp_min(1e-12)
        return losses.cross_entropy(logits.float() / gap, y)


class Sureness:
    """Z_y − max_{c≠y} Z_c: what makes a net surer of its answer."""

    needs_clean: ClassVar[bool] = False

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        return -losses.margin(logits, y)


class Noise(Seeded):
    """The worst of uniform and of corner noise in the ball, by the margin: what needs no gradient and no search."""

    def __init__(self, threat: Threat, draws: int = 20, seed: int = 0) -> None:
        self.threat, self.draws, self.seed, self.calls = threat, draws, seed, 0

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with borrowed(net, x, y) as (x, y), torch.no_grad():
            generator = self.generator(x.device)
            score = torch.full((len(x),), -torch.inf, device=x.device)
            best = x
            for draw in range(self.draws):
                change = self.threat.noise(x, generator)
                if draw % 2:
                    change = self.threat.eps * self.threat.ascent(change)
                images = self.threat.project(x, x + change)
                found = losses.margin(net(images), y)
                better = found > score
                best = torch.where(better.view(-1, 1, 1, 1), images, best)
                score = torch.where(better, found, score)
        return best


@dataclass
class _Trial:
    """The net, the images, and which of them an attack turns."""

    net: nn.Module
    x: Tensor
    y: Tensor
    chunk: int
    tell: Callable[[str], None]
    unit: float = 0.0  # see :func:`.rounding`

    def logits(self, x: Tensor) -> Tensor:
        with undisturbed(self.net), torch.no_grad():
            return torch.cat([self.net(part) for part in x.split(self.chunk)])

    def turned(self, name: str, attack: Attack, among: Tensor, on: nn.Module | None = None) -> Tensor:
        """(N,) bool: of the images ``among`` (N,), those that are misclassified once attacked (through ``on``)."""
        self.tell(name)
        turned = torch.zeros_like(among)
        if not among.any():
            return turned
        for index, rows in enumerate(among.nonzero().flatten().split(self.chunk)):
            attack.reseed(index)
            x_adv = attack(on or self.net, self.x[rows], self.y[rows])
            logits = self.logits(x_adv)
            turned[rows] = (logits.argmax(1) != self.y[rows]) | ~logits.isfinite().all(1)
        return turned


def sanity_checks(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    transfer_from: nn.Module | None = None,
    held: Tensor | None = None,
    steps: int = 20,
    queries: int = 300,
    thorough: bool = False,
    seed: int = 0,
    tell: Callable[[str], None] = lambda step: None,
) -> SanityReport:
    """Everything that can be asked of a network before its robust accuracy is believed.

    Costs about ``4 · steps`` gradients of every image, ``steps`` to ``8 · steps`` more of those that stand after PGD, and
    ``queries`` forwards of those that stand after all of these.  The net is given back as it was, and so is
    the global random generator.

    Args:
        net: images (N, C, H, W), or rows of features (N, D), in [0,1] → logits (N, K).
        x, y: a sample of the images that the accuracy is of, and their labels; 256 are enough, 16 the least.
        threat: the ball of the claim.
        transfer_from: another net for these images, an undefended twin at best; without it that check is left out.
        held: (N,) bool, which of these images withstand the suite that is to be judged.  Whether an attack of the checks is
            weak says nothing of a suite that felled what it missed, so that only images that stand in the suite count; and
            where one falls to a check, the suite was too weak (:func:`suite_check`, which is then among the checks).
        steps: of PGD; the check of more steps takes five times as many.
        queries: of the Square attack.
        thorough: attack also where outputs or gradients are already found broken, of which no attack can tell more.
        tell: is told what runs.

    A net that computes in bf16 or fp16 inside is suspicious at best, and no more than that for its rounding.

    Raises:
        ValueError: fewer than 16 images, images that are not in [0,1], labels or logits of another shape, a ball without
            radius.

    Logits that are not finite, that are the same for all images, or never rightly largest make the net invalid, and nothing
    more is asked of it.  So does a clean accuracy that a guesser reaches; of that net no attack is asked.
    """
    with answering(net) as module:
        net, x = as_images(module, x)
        x, y, labels = _require(net, x, y, threat, held)
        devices = [] if x.device.type == "cpu" else [x.device]
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices, device_type=x.device.type):
            torch.manual_seed(seed)  # what a random net draws repeats
            x, y = x.detach().clone(), y.clone()  # clones: tensors made under inference mode refuse autograd
            with undisturbed(net), measuring(net) as largest, torch.no_grad():
                answer(net, x[:2], labels)
            # A whole sample in one batch where it fits: the net is judged as it is used.
            trial = _Trial(Reachable(net), x, y, largest.chunk(x.device), tell, rounding(net, x[:2]))
            tell("outputs")
            logits = trial.logits(x)
            right = (logits.argmax(1) == y) & logits.isfinite().all(1)
            checks = [finite_check(int((~logits.isfinite().all(1)).sum()), len(x)), _varied(logits)]
            stand = {"clean": right}
            if not any(check.grave for check in checks):
                answers = logits.argmax(1)
                chance = luck(answers, y, logits.shape[1])
                checks.append(guess_check(chance, int(right.sum()), len(x), len(answers.unique())))
            if right.any() and not any(check.grave for check in checks[:2]):
                checks += [
                    _rounding_check(trial.unit),
                    _logits_check(trial, logits, threat),
                    _repeats(trial, logits),
                    _alone(trial, logits),
                    *_gradient_checks(net, trial, right, seed),
                    _jumps(net, trial, right, threat, float(logits.std()), seed),
                ]
                if thorough or not any(check.grave for check in checks):
                    suite = right if held is None else held.to(x.device)
                    found, after = _attack_checks(trial, right, suite, threat, transfer_from, steps, queries, seed)
                    checks, stand = [*checks, *found], stand | after
            accuracy = {name: float(left.double().mean()) for name, left in stand.items()}
            report = SanityReport(tuple(checks), accuracy, len(x), tuple([*stand.values()][-1].tolist()))
            return report if held is None else replace(report, checks=(*checks, suite_check(held, report)))


def _attack_checks(
    trial: _Trial,
    right: Tensor,
    held: Tensor,
    threat: Threat,
    twin: nn.Module | None,
    steps: int,
    queries: int,
    seed: int,
) -> tuple[list[Check], dict[str, Tensor]]:
    """The checks, and what stands after more and more attacks, (N,) bool each; the last after all.

    held: who withstands what is judged, (N,) bool; no other image counts.
    """
    n = len(right)

    def share(name: str, which: Tensor, what: str, n: int = n) -> Check:
        return share_check(name, int((which & held).sum()), n, what)

    def pgd(objective: Objective, scale: float = 1, longer: int = 1, restarts: int = 1) -> PGD:
        # Each its own start, so that none is a repetition of another.
        own = seed * 10 + restarts + longer
        return PGD(threat.scaled(scale), steps * longer, restarts=restarts, objective=objective, seed=own)

    fgsm = trial.turned("FGSM", FGSM(threat), right)
    plain = trial.turned(f"PGD-{steps}", pgd(CrossEntropy()), right)
    margin = trial.turned(f"PGD-{steps} on the margin", pgd(Margin()), right)
    left = right & ~plain
    scaled = trial.turned(f"PGD-{steps} on scaled logits", pgd(ScaledCrossEntropy()), left)
    # Who withstands every short attack: what the losses tell is told by their own checks, and once.
    few = left & ~margin & ~scaled & (torch.arange(n, device=left.device) < LONG)
    longer = trial.turned(f"PGD-{5 * steps}", pgd(CrossEntropy(), longer=5), few)
    again = trial.turned(f"PGD-{steps}, 3 more starts", pgd(CrossEntropy(), restarts=3), few)
    whitebox = fgsm | plain | margin | scaled | longer | again

    half = trial.turned(f"PGD-{steps} at ε/2", pgd(CrossEntropy(), 0.5), right)
    double = trial.turned(f"PGD-{steps} at 2 ε", pgd(CrossEntropy(), 2), plain)
    more = trial.turned(f"PGD-{steps} at 4 ε", pgd(CrossEntropy(), 4), double)
    back = max((less & ~more & held for less, more in ((half, plain), (plain, double), (double, more))), key=torch.sum)
    large = trial.turned(f"PGD-{steps} at {LARGE:g} ε", pgd(CrossEntropy(), LARGE), right)
    large |= trial.turned(f"PGD-{steps} on the margin at {LARGE:g} ε", pgd(Margin(), LARGE), right & ~large)

    stand = right & ~whitebox
    noise = trial.turned("noise", Noise(threat, seed=seed), stand)
    square = trial.turned(f"Square, {queries} queries", Square(threat, queries, seed=seed), stand)
    checks = [
        share("PGD ≥ FGSM", fgsm & ~plain, f"fall to FGSM and withstand PGD-{steps}"),
        share("enough steps", longer, f"withstand PGD-{steps} on every loss and fall to PGD-{5 * steps}", min(n, LONG)),
        share("enough restarts", again, "withstand one start of PGD on every loss and fall to three more", min(n, LONG)),
        # One way alone: that the margin is the weaker loss, as in honest nets of attention, takes nothing from the number.
        share("losses agree", margin & ~plain, "fall to PGD on the margin and withstand it on the cross-entropy"),
        share("scale of the logits", scaled, "fall to PGD only when the logits are scaled down for it"),
        share("success grows with ε", back, "fall at some ε and withstand twice as much"),
        share("nothing withstands a large ε", right & ~large, f"withstand {LARGE:g} ε"),
        share("gradients beat noise", noise, "withstand every gradient attack and fall to noise"),
        share("gradients beat Square", square, "withstand every gradient attack and fall to Square"),
    ]
    searched = whitebox | noise | square
    fallen = {"FGSM": fgsm, f"PGD-{steps}": plain, "gradient attacks": whitebox, "with noise and Square": searched}
    if twin is not None:
        moved = trial.turned("transfer", pgd(Margin()), stand, on=Reachable(twin))
        checks.append(share("gradients beat transfer", moved, "withstand every gradient attack and fall to transfer"))
        fallen["with transfer"] = searched | moved
    return checks, {name: right & ~turned for name, turned in fallen.items()}


def _gradient_checks(net: nn.Module, trial: _Trial, right: Tensor, seed: int) -> list[Check]:
    trial.tell("gradients")
    parts = [rows.split(trial.chunk) for rows in (trial.x[right], trial.y[right])]
    zero = torch.cat([zero_gradients(net, x, y) for x, y in zip(*parts, strict=True)])
    few = right.nonzero().flatten()[:SLOPES]
    missed = _each(lambda x, y: gradient_error(net, x, y, seed=seed), trial, few)
    calls, cuts = watched(net, trial.x[:2])
    by = f"; the forward cuts the graph by {', '.join(cuts)}" if cuts else ""
    limits = ROUNDED_SLOPE if trial.unit else SLOPE
    what = f"have a gradient that misses more than {100 * limits[0]:g} % of the slope{by}"
    some, much = (int((~(missed <= limit)).sum()) for limit in limits)  # a slope that is no number is missed too
    return [
        share_check("gradients are not zero", int(zero.sum()), int(right.sum()), f"have no gradient{by}"),
        share_check("gradient is the slope", some, len(few), what, much),
        Check(
            "no autograd inside forward",
            not calls,
            float(len(calls)),
            "none",
            f"the forward calls {', '.join(calls)}" if calls else "the forward calls nothing of autograd",
        ),
    ]


def _jumps(net: nn.Module, trial: _Trial, right: Tensor, threat: Threat, scale: float, seed: int) -> Check:
    trial.tell("jumps")
    few = right.nonzero().flatten()[:JUMPS]
    generator = torch.Generator(trial.x.device).manual_seed(seed)
    x = trial.x[few]
    up = FGSM(threat)(trial.net, x, trial.y[few]) - x  # across what decides, and at random
    noise = threat.eps * threat.ascent(threat.noise(x, generator))
    jumps = torch.zeros(len(few), device=x.device)
    for way in (up, noise):
        begin, end = threat.project(x, x - way), threat.project(x, x + way)
        parts = zip(begin.split(trial.chunk), end.split(trial.chunk), strict=True)
        jumps = torch.maximum(jumps, torch.cat([largest_jump(net, *part) for part in parts]) / max(scale, 1e-12))
    what = f"meet jumps of the logits inside the ball, the largest of {float(jumps.max()):.2g} of their standard deviation"
    return share_check("outputs do not jump", int((~(jumps <= JUMP + ROUNDED * trial.unit)).sum()), len(few), what)


def _each(function: Callable[[Tensor, Tensor], Tensor], trial: _Trial, rows: Tensor) -> Tensor:
    return torch.cat([function(trial.x[part], trial.y[part]) for part in rows.split(trial.chunk)])


def _logits_check(trial: _Trial, logits: Tensor, threat: Threat) -> Check:
    values = logits.double()
    sums, normalised = (values.sum(1) - 1).abs().max(), values.logsumexp(1).abs().max()
    name, expected = "outputs are logits", "no probabilities"
    if values.min() >= -1e-6 and sums < 1e-3:
        return Check(name, False, float(sums), expected, "the outputs are probabilities: leave out the softmax", grave=True)
    if normalised < 1e-3:  # a shift of all logits, which neither cross-entropy nor differences of logits see
        return Check(name, True, float(normalised), expected, "the outputs are log-probabilities, which serve as logits")
    affine = _affine_softmax(trial, values, threat)
    if affine is not None:
        scale, shift = affine
        if math.isnan(shift):
            found = f"the outputs are {scale:.2g} · probabilities, shifted by class: leave out the softmax"
            return Check(name, False, scale, expected, found, grave=True)
        rounded = round(shift / scale, 2) * scale
        found = f"the outputs are {scale:.2g} · probabilities {rounded:+.2g}: leave out the softmax"
        return Check(name, False, scale, expected, found, grave=True)
    if values.min() >= 0 and values.max() <= 1:
        found = "all outputs lie in [0,1], as those of a sigmoid do"
        return Check(name, False, float(values.max()), expected, found)
    return Check(name, True, float(normalised), expected, "the outputs are no probabilities")


def _affine_softmax(trial: _Trial, values: Tensor, threat: Threat) -> tuple[float, float] | None:
    """a and b of outputs a · softmax + b, b NaN where each class has a shift of its own; None where they are none.

    Two signs: every row has the same sum, as that of centred logits has too; and where the net is surest, one class is at a
    ceiling and all others at one floor, which logits never reach.  For the second, images are moved far towards the class
    they have (not with two classes, where every row is a ceiling and a floor).
    """
    sums = values.sum(1)
    if sums.max() - sums.min() > 1e-4 * values.abs().max():
        return None
    if values.shape[1] > 2:
        x, y = trial.x[:SLOPES], values[:SLOPES].argmax(1)
        attack = PGD(threat.scaled(LARGE), steps=20, objective=Sureness())
        surer = [
            trial.logits(attack(trial.net, *part)) for part in zip(x.split(trial.chunk), y.split(trial.chunk), strict=True)
        ]
        values = torch.cat([values, *(part.double() for part in surer)])
    for own in (False, True):  # a shift for each class: its smallest output
        ordered = (values - values.amin(0) * own).sort(1, descending=True).values
        floor = ordered[:, 1:].mean(1)
        height, rows = (ordered[:, 0] - floor).topk(SUREST)
        apart = (ordered[rows, 1] - ordered[rows, -1]).max()
        if max(apart, height.max() - height.min()) <= 0.01 * height.max():
            return float(height.max()), math.nan if own else float(floor[rows].mean())
    return None


def _rounding_check(unit: float) -> Check:
    """A rounding inside is no defense, but hides steps smaller than it from everything that measures."""
    found = (
        f"the forward rounds inside to about {-math.log2(unit):.0f} bits" if unit else "the forward rounds to no half floats"
    )
    return Check("full precision inside", not unit, unit, "no half floats", found + (": judge it in fp32" if unit else ""))


def _same(name: str, expected: str, what: str, trial: _Trial, logits: Tensor, others: Iterable[Tensor]) -> Check:
    scale = float(logits.double().std().clamp_min(1e-12))
    apart = max(float((logits[: len(other)] - other).abs().nan_to_num(FAR).max()) for other in others) / scale
    found = f"{what} differ by {apart:.2g} standard deviations of the logits at most"
    allowed = SAME + ROUNDED * trial.unit
    return Check(name, apart <= allowed, apart, expected, found, grave=apart > allowed)


def _repeats(trial: _Trial, logits: Tensor) -> Check:
    return _same(
        "deterministic", "two passes equal", "two passes over the same images", trial, logits, [trial.logits(trial.x)]
    )


def _alone(trial: _Trial, logits: Tensor) -> Check:
    backwards = trial.logits(trial.x.flip(0)).flip(0)
    single = torch.cat([trial.logits(one) for one in trial.x[:ALONE].split(1)])
    name, what = "independent of the batch", "logits of an image alone, in the batch and in the reversed batch"
    return _same(name, "an image's logits are its own", what, trial, logits, [single, backwards])


def _require(net: nn.Module, x: Tensor, y: Tensor, threat: Threat, held: Tensor | None) -> tuple[Tensor, Tensor, range]:
    x, y, labels = checked(net, x, y)
    if len(x) < 16:
        raise ValueError(f"sanity: expected at least 16 images (N, C, H, W) and their labels (N,), found {len(x)}")
    if held is not None and (held.shape != y.shape or held.dtype != torch.bool):
        raise ValueError(f"held: expected bool ({len(x)},), one an image; found {held.dtype} {tuple(held.shape)}")
    if threat.eps <= 0:
        raise ValueError(f"threat.eps: expected a ball with a radius, found {threat!r}")
    threat.check(tuple(x.shape[1:]))
    return x, y, labels
