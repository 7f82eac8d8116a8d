"""The same attack by us and by other libraries, image by image: who falls, and how far apart the images end.

Peers that are not installed are named; nothing here is needed by the library itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch
from torch import Tensor, nn

from glassarmor.defenses import FGSM, L2, PGD, CarliniWagner, Linf, Square, Threat
from glassarmor.defenses.attacks.autoattack import AutoAttackPart, quiet
from glassarmor.defenses.threat import norms

PACKAGES: Final = {
    "pyautoattack": "pyautoattack",
    "torchattacks": "torchattacks",
    "Foolbox": "foolbox",
    "adversarial-library": "adv-lib",
}
Peer = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]  # net, x, y, radius → x'


def installed() -> dict[str, str | None]:
    """By library, its version, or None."""
    found: dict[str, str | None] = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = None
    return found


def auto_attack(part: str) -> Peer:
    """The package's own loop over one of its attacks."""

    def run(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        from pyautoattack import AutoAttack

        with quiet(), torch.random.fork_rng():
            whole = AutoAttack(net, norm=threat.name, eps=threat.eps, seed=0, version="custom", attacks=[part], device="cpu")
            whole.apgd.loss = "ce"
            found = whole.run_standard_evaluation(x, y, batch_size=len(x))
        return found[0] if isinstance(found, tuple) else found

    return run


def torchattacks_pgd(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    import torchattacks

    return torchattacks.PGD(net, eps=threat.eps, alpha=threat.eps / 4, steps=20, random_start=False)(x, y)


def torchattacks_pgd_l2(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    import torchattacks

    return torchattacks.PGDL2(net, eps=threat.eps, alpha=threat.eps / 4, steps=20, random_start=False)(x, y)


def torchattacks_fgsm(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    import torchattacks

    return torchattacks.FGSM(net, eps=threat.eps)(x, y)


def torchattacks_square(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    import torchattacks

    return torchattacks.Square(net, norm="Linf", eps=threat.eps, n_queries=500, seed=0)(x, y)


def _foolbox(attack: Any, net: nn.Module, x: Tensor, y: Tensor, eps: float | None) -> Tensor:
    import foolbox

    _, found, _ = attack(foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, y, epsilons=eps)
    return found


def foolbox_pgd(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=threat.eps / 4, steps=20, random_start=False)
    return _foolbox(attack, net, x, y, threat.eps)


def foolbox_pgd_l2(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    import foolbox

    attack = foolbox.attacks.L2PGD(abs_stepsize=threat.eps / 4, steps=20, random_start=False)
    return _foolbox(attack, net, x, y, threat.eps)


def foolbox_fgsm(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    import foolbox

    return _foolbox(foolbox.attacks.FGSM(random_start=False), net, x, y, threat.eps)


def foolbox_cw(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    import foolbox

    attack = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=50, stepsize=0.01, initial_const=1e-3)
    return _foolbox(attack, net, x, y, None)


def library_pgd(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    from adv_lib.attacks import pgd_linf

    return pgd_linf(net, x, y, threat.eps, steps=20, random_init=False, restarts=1, relative_step_size=0.25)


def library_cw(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    from adv_lib.attacks import carlini_wagner_l2

    return carlini_wagner_l2(net, x, y, binary_search_steps=5, max_iterations=50, learning_rate=0.01, initial_const=1e-3)


def _pgd(threat: Threat) -> PGD:
    return PGD(threat, 20, step_size=threat.eps / 4, start="none")


def _cw(threat: Threat) -> CarliniWagner:
    return CarliniWagner(steps=50, search_steps=5)


PAIRS: Final[tuple[tuple[str, str, Callable[[Threat], Any], Peer], ...]] = (
    ("pyautoattack", "APGD-CE", lambda t: AutoAttackPart(t, "apgd-ce"), auto_attack("apgd-ce")),
    ("pyautoattack", "APGD-T", lambda t: AutoAttackPart(t, "apgd-t"), auto_attack("apgd-t")),
    ("torchattacks", "FGSM", FGSM, torchattacks_fgsm),
    ("torchattacks", "PGD-20", _pgd, torchattacks_pgd),
    ("torchattacks", "PGD-20, L2", _pgd, torchattacks_pgd_l2),
    ("torchattacks", "Square, 500 queries", lambda t: Square(t, 500), torchattacks_square),
    ("Foolbox", "FGSM", FGSM, foolbox_fgsm),
    ("Foolbox", "PGD-20", _pgd, foolbox_pgd),
    ("Foolbox", "PGD-20, L2", _pgd, foolbox_pgd_l2),
    ("Foolbox", "C&W, L2", _cw, foolbox_cw),
    ("adversarial-library", "PGD-20", _pgd, library_pgd),
    ("adversarial-library", "C&W, L2", _cw, library_cw),
)


def peers_table(net: nn.Module, x: Tensor, y: Tensor, linf: Threat, l2: Threat) -> Iterator[str]:
    """A row an attack that both have: who stands by each, on how many images the verdict differs, how far x' are apart."""
    head = ("library", "attack", "stands, ours", "theirs", "other verdict", "same x' to 10⁻⁵", "median size, ours", "theirs")
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    found, n = installed(), len(x)
    for library, name, ours, theirs in PAIRS:
        if found[library] is None:
            continue
        threat = l2 if "L2" in name else linf
        try:
            other = theirs(net, x.clone(), y.clone(), threat).detach()
        except Exception as error:  # a peer that does not run beside this torch is said, and no reason to stop
            yield f"| {library} | {name} | | does not run: {type(error).__name__} | | | | |"
            continue
        mine = ours(threat)(net, x, y)
        with torch.no_grad():
            stand = [net(images).argmax(1) == y for images in (mine, other)]
        same = ((mine - other).flatten(1).abs().amax(1) <= 1e-5).sum()
        right = net(x).argmax(1) == y
        sizes = [float(norms(images - x, threat.p)[right].median()) for images in (mine, other)]
        cells = [*(f"{int(each.sum())} of {n}" for each in stand), int((stand[0] != stand[1]).sum()), int(same)]
        yield f"| {' | '.join(map(str, [library, name, *cells, *(f'{size:.4f}' for size in sizes)]))} |"


__all__ = ["L2", "Linf", "installed", "peers_table"]
