"""Robust accuracy that can be trusted: the attacks of a suite, each on the examples that still stand, worst case of all.

    from defenses import Linf, evaluate_robustness

    found = evaluate_robustness(net, images, labels, Linf("8/255"), suite="fast")
    print(found.accuracy, found.interval)

All attacks run in fp32, in eval mode, on logits, through whatever the net is made of: masks and wrappers are parts of it.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.autoattack import AutoAttackPart
from glassarmor.defenses.evaluation.corruptions import corrupted_accuracy
from glassarmor.defenses.evaluation.examples import FelledExamples
from glassarmor.defenses.evaluation.fingerprint import described, net_hash, settings_hash, tensors_hash
from glassarmor.defenses.evaluation.gradient import Reachable, has_gradient
from glassarmor.defenses.evaluation.inputs import (
    answered,
    as_images,
    check_images,
    counted,
    device_of,
    fooled,
    full_precision,
    predict,
)
from glassarmor.defenses.evaluation.sampling import stratified_rows, wilson
from glassarmor.defenses.evaluation.suite import Suite, SuiteName, SuiteSettings, without_gradient
from glassarmor.defenses.threat import Threat
from glassarmor.defenses.training.terms import Term
from glassarmor.interpret.inputs import checked
from glassarmor.interpret.modes import answering
from glassarmor.interpret.storage import write_atomic

STANDS: Final = -1  # in ``felled``: no attack felled it
WRONG: Final = -2  # misclassified without any attack


@dataclass(frozen=True)
class AttackRecord:
    """What one attack of a suite did.

    attacked: images that stood before it; felled: of those.  accuracy: share of all images that stand after it and all
    before it (by itself an attack may do better or worse).  forwards, backwards: images through the net, summed.
    """

    name: str
    attacked: int
    felled: int
    accuracy: float
    forwards: int
    backwards: int
    seconds: float
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Robust accuracy by a suite, example by example.

    rows: places of the judged images among those given, (n,) int64, increasing; labels: theirs, (n,).
    standing: rightly classified, and by every attack's image too, (n,) bool.
    felled: the attack, as its place in ``attacks``, (n,) int64; STANDS = −1, WRONG = −2 for what needs no attack.
    interval: Wilson's, 95 %, for the accuracy on images drawn as these were.
    fingerprint: of weights, images, labels, settings.  notes: what a reader must know beside the numbers.
    corruptions: accuracy by corruption at its five severities, where asked for.
    gradient: whether any reaches the images; without, Square was the attack and the accuracy is only an upper limit.
    unanswered: places among the judged images, increasing, whose logits were not finite, clean or attacked: they count as
    misclassified, and make the number invalid.
    """

    suite: str
    threat: str
    rows: Tensor
    labels: Tensor
    standing: Tensor
    felled: Tensor
    attacks: tuple[AttackRecord, ...]
    clean_accuracy: float
    accuracy: float
    interval: tuple[float, float]
    seconds: float
    fingerprint: Mapping[str, str]
    notes: tuple[str, ...] = ()
    corruptions: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    gradient: bool = True
    unanswered: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        """Images that were judged."""
        return len(self.rows)

    @property
    def felled_by(self) -> tuple[str | None, ...]:
        """By example: the attack that felled it, "clean" where it was misclassified before, None where it stands."""
        names = {STANDS: None, WRONG: "clean"} | {place: attack.name for place, attack in enumerate(self.attacks)}
        return tuple(names[place] for place in self.felled.tolist())

    @property
    def forwards(self) -> int:
        return sum(attack.forwards for attack in self.attacks)

    @property
    def backwards(self) -> int:
        return sum(attack.backwards for attack in self.attacks)

    def record(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        counted = {"n": self.n, "forwards": self.forwards, "backwards": self.backwards}
        plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in vars(self).items()}
        return plain | counted | {"attacks": [asdict(attack) for attack in self.attacks], "felled_by": self.felled_by}


@dataclass(frozen=True)
class Progress:
    """Told after each batch: the attack and its place, batches done, what stands, and the time left (None: unknown).

    Told once more when all attacks are done and corruptions begin; ``place`` is then ``attacks``.

    The time left is for images that never fall, so that it shrinks faster than it passes.
    """

    attack: str
    place: int
    attacks: int
    batch: int
    batches: int
    standing: int
    n: int
    seconds: float
    left: float | None

    @property
    def accuracy(self) -> float:
        return self.standing / self.n

    @property
    def title(self) -> str:
        """What runs, an attack with its place."""
        return f"{self.place + 1}/{self.attacks} {self.attack}" if self.place < self.attacks else self.attack


@dataclass
class _State:
    """Where an evaluation stands; what is on disk between two batches."""

    fingerprint: dict[str, str]
    felled: list[int]
    place: int  # of the attack in progress
    batch: int  # that comes next
    counts: list[list[float]]  # by attack: forwards, backwards, seconds
    unanswered: list[int] = field(default_factory=list)

    @classmethod
    def resumed(cls, path: Path, fingerprint: dict[str, str]) -> _State | None:
        """What the file holds, if it belongs to this evaluation; it is said where it does not."""
        if not path.exists():
            return None
        try:
            saved = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            warnings.warn(f"{path} is no readable state ({type(error).__name__}): starting anew", stacklevel=3)
            return None
        other = [key for key, value in fingerprint.items() if saved.fingerprint.get(key) != value]
        if other:
            warnings.warn(f"{path} belongs to another evaluation (other {', '.join(other)}): starting anew", stacklevel=3)
            return None
        return saved

    def save(self, path: Path) -> None:
        write_atomic(path, json.dumps(asdict(self)))


def evaluate_robustness(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    suite: SuiteName | str | Suite = "fast",
    *,
    subset: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    terms: Mapping[str, Term] | None = None,
    twin: nn.Module | None = None,
    state: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    corruptions: bool = False,
    fallen: FelledExamples | None = None,
) -> Evaluation:
    """Worst case per example over the attacks of a suite; only examples that still stand are attacked again.

    The net and the global random generators are left as found.  A run that was stopped goes on at the batch where it was and
    ends with the same numbers: state, images, weights and settings are compared by hash.

    A net that no gradient reaches (see :func:`.has_gradient`) is attacked by Square in the place of the
    suites that have names, which a note says; a suite of your own runs as it is.

    Args:
        net: images in [0,1] to logits; fp32.
        images: (N, C, H, W) in [0,1], or rows of features (N, D) in [0,1], on any device; labels: (N,) int64.
        threat: Linf or L2.
        suite: a name of :func:`make_suite`, or a suite of your own.
        subset: judge so many, drawn with the classes in their shares; by default the suite's number, at most all.
        batch_size: images attacked together.
        seed: of the attacks and of the subset.
        terms, twin: for "adaptive", see :func:`make_suite`.
        state: file that keeps the work done; left in place at the end.
        progress: told after each batch.
        corruptions: accuracy under common corruptions too, on the same images.
        fallen: collects the adversarial images that felled examples.

    Raises:
        ValueError: see :func:`check_images`; also a subset or a batch size out of range, or an unknown suite.
    """
    settings = SuiteSettings(suite, subset, batch_size, seed, terms, twin, corruptions)
    with answering(net) as answers:
        module, images = as_images(answers, images)
        return run_suite(module, images, labels, threat, settings, state=state, progress=progress, fallen=fallen)


@dataclass(frozen=True, eq=False)
class _Case:
    """One net before one suite: what is attacked, on ``device``, and how."""

    net: nn.Module
    images: Tensor
    labels: Tensor
    threat: Threat
    suite: Suite
    batch_size: int
    device: torch.device
    progress: Callable[[Progress], None] | None
    fallen: FelledExamples | None


def run_suite(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    settings: SuiteSettings,
    *,
    state: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    fallen: FelledExamples | None = None,
) -> Evaluation:
    """:func:`evaluate_robustness` with its settings in one."""
    classes = check_images(net, images, labels, threat)
    if settings.twin is not None and check_images(settings.twin, images, labels, threat) != classes:
        raise ValueError(f"twin: expected {classes} logits, as the net returns, found another number")
    own, chosen = isinstance(settings.suite, Suite), settings.attacks(threat, classes)
    images, labels, _ = checked(net, images.detach(), labels)
    subset = settings.subset
    if subset is None:
        subset = min(len(images), chosen.subset or len(images))
    rows = stratified_rows(labels, subset, settings.seed)
    images, labels = images[rows.to(images.device)], labels[rows.to(labels.device)].cpu()
    device = device_of(net)
    weights, gradient = net_hash(net), has_gradient(net, images)
    if not gradient:
        net = Reachable(net)
        chosen = chosen if own else without_gradient(chosen, threat, settings.seed)
    case = _Case(net, images, labels, threat, chosen, settings.batch_size, device, progress, fallen)
    attacks = [{"name": step.name, **described(step.attack)} for step in chosen.steps]
    fingerprint = {
        "weights": weights,
        "images": tensors_hash(images, labels),
        "settings": settings_hash(attacks, repr(threat), threat.eps, settings.batch_size),
    }
    path = None if state is None else Path(state)
    with full_precision(device):
        now = _reached(case, fingerprint, path)
        corrupted = _corrupted(case, settings.seed, now) if settings.corruptions else {}
    felled = torch.tensor(now.felled)
    standing = felled == STANDS
    return Evaluation(
        suite=chosen.name,
        threat=repr(threat),
        rows=rows,
        labels=labels,
        standing=standing,
        felled=felled,
        attacks=_records(chosen, felled, now.counts, attacks),
        clean_accuracy=int((felled != WRONG).sum()) / len(felled),
        accuracy=int(standing.sum()) / len(felled),
        interval=wilson(int(standing.sum()), len(felled)),
        seconds=sum(count[2] for count in now.counts),
        fingerprint=fingerprint,
        notes=_notes(case, classes, gradient, own),
        corruptions=corrupted,
        gradient=gradient,
        unanswered=tuple(sorted(now.unanswered)),
    )


def _reached(case: _Case, fingerprint: dict[str, str], path: Path | None) -> _State:
    """The state when all attacks are done; goes on where the file at ``path`` left off, and writes it after each batch."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    now = _State.resumed(path, fingerprint) if path is not None else None
    if case.fallen is not None:
        case.fallen.begin(len(case.labels), fingerprint, resumed=now is not None)
    if now is None:
        parts = zip(case.images.split(case.batch_size), case.labels.split(case.batch_size), strict=True)
        logits = [(predict(case.net, x.to(case.device)).cpu(), y) for x, y in parts]
        felled = torch.cat([torch.where(answered(z, y), STANDS, WRONG) for z, y in logits])
        unanswered = torch.cat([~z.isfinite().all(1) for z, _ in logits]).nonzero().flatten()
        counts = [[0.0, 0.0, 0.0] for _ in case.suite.steps]
        now = _State(fingerprint, felled.tolist(), 0, 0, counts, unanswered.tolist())
    for reached in _attacked(case, now):
        now = reached
        if path is not None:
            now.save(path)
    return now


def _corrupted(case: _Case, seed: int, now: _State) -> Mapping[str, tuple[float, ...]]:
    if case.progress is not None:
        stand, done, seconds = now.felled.count(STANDS), len(case.suite.steps), sum(c[2] for c in now.counts)
        case.progress(Progress("corruptions", done, done, 0, 1, stand, len(case.labels), seconds, None))
    return corrupted_accuracy(case.net, case.images, case.labels, case.batch_size, seed)


def _notes(case: _Case, classes: int, gradient: bool, own: bool) -> tuple[str, ...]:
    """What a reader must know beside the numbers; ``own``: the suite is the caller's."""
    notes, size = list(case.suite.notes), (case.images.shape[2], case.images.shape[3])
    if not gradient and own:
        notes.append("no gradient reaches the images: attacks of this suite that follow one find next to nothing")
    if any(isinstance(step.attack, AutoAttackPart) and step.attack.replaced(size) for step in case.suite.steps):
        notes.append(f"AutoAttack's package cannot run its Square in L2 on {size[0]}×{size[1]} images: ours took its place")
    if classes < 4 and gradient:
        notes.append(f"with {classes} classes there is no targeted DLR loss: APGD-T goes by the margin")
    return tuple(notes)


def _attacked(case: _Case, now: _State) -> Iterator[_State]:
    """The state after each batch, from where it stands on; once at least."""
    net, images, labels, device, suite = case.net, case.images, case.labels, case.device, case.suite
    felled = torch.tensor(now.felled)
    while now.place < len(suite.steps):
        step = suite.steps[now.place]
        # Whom this attack felled stood before it: so that a resumed attack has the batches it began with.
        batches = ((felled == STANDS) | (felled == now.place)).nonzero().flatten().split(case.batch_size)
        while now.batch < len(batches) and len(batches[0]):
            rows = batches[now.batch]
            x, y = images[rows.to(images.device)].to(device), labels[rows].to(device)
            step.attack.reseed(now.batch)
            begin = time.perf_counter()
            with counted(net) as passes:
                x_adv = step.attack(net, x, y)
            fell, void = (found.cpu() for found in fooled(net, case.threat, x, x_adv, y))
            spent = (passes.forwards, passes.backwards, time.perf_counter() - begin)
            felled[rows[fell]] = now.place
            if case.fallen is not None:
                case.fallen.add(now.place, rows[fell], x_adv[fell.to(device)])
            unanswered = [*now.unanswered, *rows[void].tolist()]
            counts = [list(count) for count in now.counts]
            counts[now.place] = [old + new for old, new in zip(counts[now.place], spent, strict=True)]
            now = replace(now, felled=felled.tolist(), batch=now.batch + 1, counts=counts, unanswered=unanswered)
            if case.progress is not None:
                waiting = sum(len(rest) for rest in batches[now.batch :])
                case.progress(_progress(suite, felled, now, len(batches), waiting))
            yield now
        now = replace(now, place=now.place + 1, batch=0)
    yield now


def _progress(suite: Suite, felled: Tensor, now: _State, batches: int, waiting: int) -> Progress:
    standing = int((felled == STANDS).sum())
    passes, seconds = sum(c[0] + c[1] for c in now.counts), sum(c[2] for c in now.counts)
    later = sum(step.passes for step in suite.steps[now.place + 1 :])
    ahead = waiting * suite.steps[now.place].passes + standing * later
    known = all(step.passes for step in suite.steps) and passes > 0
    return Progress(
        suite.steps[now.place].name,
        now.place,
        len(suite.steps),
        now.batch,
        batches,
        standing,
        len(felled),
        seconds,
        ahead * seconds / passes if known else None,
    )


def _records(
    suite: Suite, felled: Tensor, counts: list[list[float]], settings: list[dict[str, Any]]
) -> tuple[AttackRecord, ...]:
    found, stood = [], int((felled != WRONG).sum())
    for place, (step, (forwards, backwards, seconds)) in enumerate(zip(suite.steps, counts, strict=True)):
        fell = int((felled == place).sum())
        accuracy = (stood - fell) / len(felled)
        record = (step.name, stood, fell, accuracy, int(forwards), int(backwards), seconds, settings[place])
        found.append(AttackRecord(*record))
        stood -= fell
    return tuple(found)
