"""The four attacks of standard AutoAttack (Croce & Hein 2020, 2003.01690), through its maintained package ``pyautoattack``.

The only module that knows the package.  Each attack runs by itself on the images it is given; which images, in which order,
and who fell is the suite's business.  The package's own loop does the same, but its checks put a trace function of the
interpreter in place of whichever is there (a debugger's, a coverage tool's).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.draws import Seeded
from glassarmor.defenses.attacks.square import Square
from glassarmor.defenses.options import require_one_of, require_whole
from glassarmor.defenses.threat import L2, Linf, Threat
from glassarmor.interpret.inputs import borrowed
from glassarmor.interpret.modes import as_module

Part = Literal["apgd-ce", "apgd-t", "fab-t", "square"]
LOGGER: Final = "auto-attack"  # the package's
TARGETS = 9  # of the two targeted attacks, where there are as many wrong classes


class AutoAttackPart(Seeded):
    """One attack of AutoAttack's standard version, as the package sets it up.

    An image that the attack does not fell comes back clean.  The global random generators, which the package seeds, are put
    back.  Where the package's Square cannot lay its first tiles (:func:`square_runs`), ours runs in its place.

    Args:
        threat: Linf or L2.
        part: "apgd-ce", "apgd-t" (9 targets, or as many wrong classes as there are), "fab-t" (as many), "square".
        queries: of Square; 5000 in the standard version.
        seed: the call number is mixed in, so that a resumed run repeats an uninterrupted one.

    Raises:
        ValueError: another threat or part, no query; when called, apgd-t with fewer than 4 classes, fab-t without a rival.
    """

    def __init__(self, threat: Threat, part: Part, queries: int = 5000, seed: int = 0) -> None:
        if not isinstance(threat, Linf | L2):
            raise ValueError(f"threat: AutoAttack's standard version is run for Linf and L2, found {threat}")
        require_one_of("attack.part", part, get_args(Part))
        require_whole("attack.queries", queries, 1)
        self.threat: Threat = threat
        self.part = part
        self.queries = queries
        self.seed = seed
        self.calls = 0

    def replaced(self, size: tuple[int, int]) -> bool:
        """Whether images of this (height, width) get our Square in the place of the package's."""
        return self.part == "square" and not square_runs(self.threat, size)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (N, C, H, W), fp32, detached; for the arguments see :class:`.APGD`."""
        seed = self.next_seed()
        net = as_module(net)
        with borrowed(net, x, y) as (x, y), quiet(), torch.no_grad(), _forked(x.device):
            if self.replaced((x.shape[2], x.shape[3])):
                ours = Square(self.threat, max(3, self.queries), seed=self.seed)
                ours.reseed(self.calls - 1)
                return ours(net, x, y)
            attack = self._attack(net, x.device, seed, classes=net(x[:1]).shape[1])
            found: Tensor = attack.perturb(x, y)
        return found.detach()

    def _attack(self, net: nn.Module, device: torch.device, seed: int, classes: int) -> Any:
        from pyautoattack import AutoAttack  # here: importing it takes longer than most runs of a suite

        package = AutoAttack(net, norm=self.threat.name, eps=self.threat.eps, seed=seed, version="standard", device=device)
        if self.part == "apgd-ce":
            package.apgd.loss = "ce"
            return package.apgd
        if self.part == "apgd-t":
            if classes < 4:
                raise ValueError(f"attack.part: apgd-t needs 4 classes for its targeted DLR loss, found {classes}")
            package.apgd_targeted.n_target_classes = min(TARGETS, classes - 1)
            return package.apgd_targeted
        if self.part == "fab-t":
            package.fab.targeted, package.fab.n_restarts = True, 1
            package.fab.n_target_classes = min(TARGETS, classes - 1)
            return package.fab
        package.square.n_queries = self.queries
        return package.square


def square_runs(threat: Threat, size: tuple[int, int]) -> bool:
    """Whether the package's Square runs on images of this (height, width): in L2 its first tiles do not fit many sizes.

    It begins with tiles of side ⌊h/5⌋ from an offset that is right for the height alone, as many as ⌊h/side⌋ and ⌊w/side⌋:
    where they end outside the image it stops with an error of shapes (32×48, 12×12), and below 5 rows there is no tile.
    """
    if not isinstance(threat, L2):
        return True
    side = size[0] // 5
    offset = (size[0] - 5 * side) // 2
    return side == 1 or (side > 1 and all(offset + length // side * side <= length for length in size))


def _forked(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


@contextmanager
def quiet() -> Iterator[None]:
    """What the package says of its settings at every call is not said; its warnings are."""
    logger = logging.getLogger(LOGGER)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
