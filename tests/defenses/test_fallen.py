"""The adversarial images of a suite that are kept: whose, how many, through an interruption; they are the suite's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from glassarmor.defenses.evaluation.examples import FelledExamples, Replay
from glassarmor.defenses.evaluation.robustness import evaluate_robustness
from glassarmor.defenses.evaluation.suite import Step, Suite
from glassarmor.defenses.threat import Linf

THREAT = Linf(0.2)


def brightness_net() -> nn.Module:
    """Class 1 where the four pixels sum to more than 2: any pixel can carry an image over the boundary."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 4))
        net[1].bias.copy_(torch.tensor([2.0, -2.0]))
    return net.eval()


class Raise:
    """Brightens one pixel: the perturbation tells which attack made the image."""

    threat = THREAT

    def __init__(self, pixel: int, by: float) -> None:
        self.pixel, self.by = pixel, by

    def reseed(self, call: int) -> None:
        pass

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0, self.pixel // 2, self.pixel % 2] += self.by
        return x


DARK = torch.tensor([0.49, 0.46, 0.40, 0.49, 0.46, 0.49])  # one pixel + 0.1 carries 0.49 over, + 0.2 also 0.46, nothing 0.40
IMAGES, LABELS = DARK.view(6, 1, 1, 1).expand(6, 1, 2, 2).contiguous(), torch.zeros(6, dtype=torch.int64)
SUITE = Suite("two", (Step("weak", Raise(0, 0.1)), Step("strong", Raise(3, 0.2))))


def test_what_only_the_second_attack_broke_is_kept_as_the_second_attack_made_it() -> None:
    net, fallen = brightness_net(), FelledExamples(10)
    found = evaluate_robustness(net, IMAGES, LABELS, THREAT, SUITE, batch_size=2, fallen=fallen)
    assert found.felled.tolist() == [0, 1, -1, 0, 1, 0]
    assert sorted(fallen.places.tolist()) == [0, 1, 3, 4, 5]
    assert fallen.attacks.tolist() == found.felled[fallen.places].tolist()
    delta = (fallen.images - IMAGES[fallen.places]).flatten(1)
    for attack, change in zip(fallen.attacks.tolist(), delta, strict=True):
        expected = [0.1, 0, 0, 0] if attack == 0 else [0, 0, 0, 0.2]
        assert change.tolist() == pytest.approx(expected, abs=1e-6)
    assert (net(fallen.images).argmax(1) == 1).all()


def test_the_page_is_answered_with_these_images_and_attacks_the_others_itself() -> None:
    net, fallen = brightness_net(), FelledExamples(10)
    evaluate_robustness(net, IMAGES, LABELS, THREAT, SUITE, fallen=fallen)
    places = torch.tensor([2, 4, 0])
    attack = Replay(fallen, places, Raise(1, 0.05))
    assert attack.known.tolist() == [False, True, True]
    delta = (attack(net, IMAGES[places], LABELS[places]) - IMAGES[places]).flatten(1)
    expected = torch.tensor([[0, 0.05, 0, 0], [0, 0, 0, 0.2], [0.1, 0, 0, 0]])
    torch.testing.assert_close(delta, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"recalled: expected the 3 examples it was made for, found 2"):
        attack(net, IMAGES[:2], LABELS[:2])
    alone = Replay(FelledExamples(3), places, Raise(1, 0.05))(net, IMAGES[places], LABELS[places])
    torch.testing.assert_close(alone, Raise(1, 0.05)(net, IMAGES[places], LABELS[places]))


@given(
    attacks=st.lists(st.integers(-1, 3), min_size=1, max_size=40),
    most=st.integers(1, 12),
    each=st.integers(0, 4),
    size=st.integers(1, 9),
)
def test_batch_by_batch_the_sample_is_that_of_all_at_once(attacks: list[int], most: int, each: int, size: int) -> None:
    """Slow reference: all fallen in the order of chance, the first ``each`` of every attack moved before the others."""
    fallen = FelledExamples(most, each=each)
    fallen.begin(len(attacks), {}, resumed=False)
    felled = torch.tensor(attacks)
    for attack in range(4):
        for places in (felled == attack).nonzero().flatten().split(size):
            fallen.add(attack, places, places.view(-1, 1, 1, 1).float())
    chance = torch.randperm(len(attacks), generator=torch.Generator().manual_seed(0)).tolist()
    order = sorted((i for i, attack in enumerate(attacks) if attack >= 0), key=lambda i: chance[i])
    seen = {i: [j for j in order if attacks[j] == attacks[i]].index(i) for i in order}
    expected = [i for i in order if seen[i] < each] + [i for i in order if seen[i] >= each]
    assert fallen.places.tolist() == expected[:most]
    assert fallen.attacks.tolist() == [attacks[i] for i in expected[:most]]
    assert fallen.images.flatten().tolist() == expected[:most]


def test_an_interruption_changes_nothing_and_a_foreign_file_is_said(tmp_path: Path) -> None:
    net, whole = brightness_net(), FelledExamples(3, each=1)
    evaluate_robustness(net, IMAGES, LABELS, THREAT, SUITE, batch_size=1, fallen=whole)
    told = []

    def stop(now) -> None:
        told.append(now)
        if len(told) == 8:  # in the second attack
            raise KeyboardInterrupt

    at, path = tmp_path / "state.json", tmp_path / "fallen.npz"
    options = {"batch_size": 1, "state": at}
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(net, IMAGES, LABELS, THREAT, SUITE, progress=stop, fallen=FelledExamples(3, path, 1), **options)
    again = FelledExamples(3, path, 1)
    evaluate_robustness(net, IMAGES, LABELS, THREAT, SUITE, fallen=again, **options)
    assert again.places.tolist() == whole.places.tolist()
    assert torch.equal(again.images, whole.images)
    path.unlink()
    with pytest.warns(UserWarning, match=r"the images that fell so far are lost"):
        evaluate_robustness(net, IMAGES, LABELS, THREAT, SUITE, fallen=FelledExamples(3, path), **options)
    others = FelledExamples(3, path)
    others.begin(6, {"weights": "other"}, resumed=False)
    others.add(0, torch.tensor([1]), IMAGES[:1])
    kept = FelledExamples(3, path)
    with pytest.warns(UserWarning, match=r"of another evaluation"):
        evaluate_robustness(net, IMAGES, LABELS, THREAT, SUITE, fallen=kept, **options)
    assert len(kept.places) == 0


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"examples.most: expected a whole number >= 1"):
        FelledExamples(0)
