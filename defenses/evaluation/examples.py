"""The adversarial images that felled examples, as the attacks of a suite made them: what explains a failure (ours).

fallen = Fallen(128)
found = evaluate_robustness(net, images, labels, threat, "standard", fallen=fallen)
attack = Recalled(fallen, places, PGD(threat))  # answers with the suite's own images wherever it kept one
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.pgd import Attack
from glassarmor.defenses.options import require_whole
from glassarmor.defenses.threat import Threat
from glassarmor.interpret.storage import write_atomic


class FelledExamples:
    """A sample of bounded size: the first ``each`` images of every attack, then those of all attacks as chance has it.

    So what only Square or FAB broke is not crowded out by what any attack breaks.  The order of chance is fixed by the
    number of images alone: neither the batches nor an interruption change who is kept.

    ``places`` (k,) int64 among the judged images, in that order; ``attacks`` (k,) int64, the place of the attack that
    felled each, as in ``Evaluation.felled``; ``images`` (k, C, H, W) fp32 on the CPU.  k ≤ most.

    Args:
        most: images that are kept.
        path: .npz that holds them too, beside the state of the evaluation; None: memory only.
        each: images of every attack that go before all others.

    Raises:
        ValueError: fewer than one image.
    """

    def __init__(self, most: int, path: str | Path | None = None, each: int = 4) -> None:
        require_whole("examples.most", most, 1)
        require_whole("examples.each", each, 0)
        self.most, self.each = most, each
        self.path = None if path is None else Path(path)
        self._clear(0, {})

    def _clear(self, n: int, fingerprint: Mapping[str, str]) -> None:
        self.fingerprint = dict(fingerprint)
        self.priority = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        self.places, self.attacks = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        self.images = torch.zeros(0)

    def begin(self, n: int, fingerprint: Mapping[str, str], resumed: bool) -> None:
        """Forget everything, or take up what the file holds where an evaluation of ``n`` images goes on.

        Without a file of that evaluation the images of those that fell before are lost; it is said.
        """
        self._clear(n, fingerprint)
        if self.path is None or not resumed:
            return
        try:
            with np.load(self.path) as saved:
                if json.loads(str(saved["fingerprint"])) != self.fingerprint:
                    raise ValueError("of another evaluation")
                self.places, self.attacks, self.images = (
                    torch.from_numpy(saved[key]) for key in ("places", "attacks", "images")
                )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            warnings.warn(f"{self.path}: the images that fell so far are lost ({error})", stacklevel=3)

    def add(self, attack: int, places: Tensor, images: Tensor) -> None:
        """Images (m, C, H, W) by which the attack felled the examples ``places`` (m,); an example seen again is replaced."""
        if not len(places):
            return
        old = ~torch.isin(self.places, places)
        new = images.detach().cpu().float()
        every = torch.cat([self.places[old], places]), torch.cat([self.attacks[old], torch.full_like(places, attack)])
        order = self._order(*every)[: self.most]
        kept = torch.cat([self.images[old], new])[order] if len(self.images) else new[order]
        self.places, self.attacks, self.images = every[0][order], every[1][order], kept
        if self.path is not None and torch.isin(places, self.places).any():
            self._save(self.path)

    def _order(self, places: Tensor, attacks: Tensor) -> Tensor:
        by_chance = self.priority[places].argsort()
        grouped = by_chance[attacks[by_chance].argsort(stable=True)]
        counts = torch.bincount(attacks)
        rank = torch.empty_like(places)
        rank[grouped] = torch.arange(len(places)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        later = rank[by_chance] >= self.each
        return by_chance[later.long().argsort(stable=True)]

    def _save(self, path: Path) -> None:
        content = io.BytesIO()
        np.savez(
            content,
            fingerprint=json.dumps(self.fingerprint),
            places=self.places.numpy(),
            attacks=self.attacks.numpy(),
            images=self.images.numpy(),
        )
        write_atomic(path, content.getbuffer())


class Replay:
    """An attack that answers with the images by which a suite felled these examples, and attacks the others itself.

    Args:
        fallen: the sample.
        places: (N,) int64, the examples that it will be called with, in order, by place among the judged images.
        attack: for examples that stood, were wrong without any attack, or of which no image was kept.
    """

    def __init__(self, fallen: FelledExamples, places: Tensor, attack: Attack) -> None:
        self.attack = attack
        match = places[:, None] == fallen.places[None]
        self.known = match.any(1)  # (N,) bool
        self.images = fallen.images[match.long().argmax(1)[self.known]] if self.known.any() else fallen.images

    @property
    def threat(self) -> Threat:
        return self.attack.threat

    def reseed(self, call: int) -> None:
        self.attack.reseed(call)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (N, C, H, W), detached.

        Raises:
            ValueError: other examples than it was made for, by their number.
        """
        if len(x) != len(self.known):
            raise ValueError(f"recalled: expected the {len(self.known)} examples it was made for, found {len(x)}")
        with torch.inference_mode(False), torch.no_grad():  # ordinary images, wherever they are asked for
            found = x.detach().clone()
            known = self.known.to(x.device)
            if known.any():
                found[known] = self.images.to(x)
            if not known.all():
                found[~known] = self.attack(net, x[~known], y[~known]).to(x)
        return found
