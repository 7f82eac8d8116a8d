"""Masked units: each criterion finds the unit planted for it, the masked net is the net computed by hand, attacks see it."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.masking import UnitMask, choose_units, fine_tune, mask_of, masked, unit_scores
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE
from glassarmor.interpret.observation import feature_layers, observe
from glassarmor.interpret.signals.sensitivity import relative_unit_sensitivity, sensitivity_control
from tests.reference import differences
from tests.reference.nets import batch, conv_bn, seeded, smooth, unchanged, untidy
from tests.reference.trained import attacked, images


def planted() -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A linear net of four units a layer, and an attack that adds 0.05 to the first and the third channel.

    Unit 0, the difference of two channels that are nearly equal, jumps at anything, noise as well as attack; unit 1, a
    mean over 3×3 pixels, moves under the attack and hardly under noise; unit 2 moves little, but the head listens to it
    alone; unit 3 reads a channel that the attack leaves in peace.
    """
    net = nn.Sequential(
        OrderedDict(
            units=nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(4, 2),
        )
    ).eval()
    with torch.no_grad():
        net.units.weight.zero_()
        net.units.weight[0, 0, 1, 1], net.units.weight[0, 1, 1, 1] = 1, -1
        net.units.weight[1, 2] = 1 / 9
        net.units.weight[2, 0, 1, 1] = net.units.weight[3, 1, 1, 1] = 1
        net.head.weight.copy_(torch.tensor([[0.0, 0.0, -3.0, 0.5], [0.2, 0.1, 3.0, 0.0]]))
        net.head.bias.copy_(torch.tensor([0.5, -0.5]))
    green, blue = (torch.rand(40, 8, 8, generator=seeded(i)) * 0.6 + 0.2 for i in (0, 1))
    red = green + 0.01 * torch.randn(green.shape, generator=seeded(2))
    x = torch.stack([red, green, blue], 1)
    x_adv = x + torch.tensor([0.05, 0.0, 0.05]).view(3, 1, 1)
    return net, x, x_adv, torch.zeros(40, dtype=torch.long)


@pytest.mark.parametrize(("by", "unit"), [("sensitivity", 0), ("noise_corrected", 1), ("margin", 2)])
def test_each_criterion_finds_the_unit_planted_for_it(by, unit):
    net, *data = planted()
    mask = choose_units(net, *data, ["units"], 0.25, by)
    assert (~mask.keep["units"]).nonzero().flatten().tolist() == [unit]
    assert mask.by == by


def test_scores_in_closed_form_and_over_all_images():
    net, x, x_adv, y = planted()
    margin = unit_scores(net, x, x_adv, y, ["units"], "margin")["units"]
    torch.testing.assert_close(margin, torch.tensor([0.2, 0.1, 6.0, -0.5]) * torch.tensor([0.05, 0.05, 0.05, 0.0]))
    whole = unit_scores(net, x, x_adv, y, ["units"], "sensitivity")["units"]
    spread = net.units(x).detach().transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(whole, torch.tensor([0.05, 0.05, 0.05, 0.0]) / spread, rtol=1e-3, atol=0)
    for by in ("margin", "sensitivity"):  # 40 images, 7 at a time: the last chunk has 5
        scores = [unit_scores(net, x, x_adv, y, ["units"], by, chunk=chunk)["units"] for chunk in (7, 40)]
        torch.testing.assert_close(scores[0], scores[1])


def test_scores_are_the_sensitivities_that_the_dashboard_shows():
    net, x, x_adv, y, _ = attacked(n=32)
    layers = ["act1", "act2"]
    obs = observe(net, x, x_adv, y, layers=layers)
    control = sensitivity_control(net, x, x_adv, y, layers, draws=1, seed=3)
    found = {by: unit_scores(net, x, x_adv, y, layers, by, seed=3) for by in ("sensitivity", "noise_corrected")}
    for layer in layers:
        torch.testing.assert_close(found["sensitivity"][layer], relative_unit_sensitivity(obs, layer, 0.01).detach())
        torch.testing.assert_close(found["noise_corrected"][layer], control[layer].attack - control[layer].noise)


def test_random_choice_is_that_of_the_seed():
    net, *data = planted()
    chosen = [choose_units(net, *data, ["units"], 0.5, "random", seed=seed).keep["units"] for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(chosen[0], chosen[1])
    assert len({tuple(keep.tolist()) for keep in chosen}) > 1
    assert all(keep.sum() == 2 for keep in chosen)


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_logits_of_the_masked_net_by_hand(fill):
    net, x, x_adv, y = planted()
    mask = choose_units(net, x, x_adv, y, ["units"], 0.5, "sensitivity", fill=fill, chunk=7)
    assert mask.keep["units"].tolist() == [False, False, True, True]
    pooled = net.units(x_adv).mean((2, 3))
    pooled[:, :2] = net.units(x).mean((0, 2, 3))[:2] if fill == "mean" else 0.0
    torch.testing.assert_close(masked(net, mask)(x_adv), pooled @ net.head.weight.T + net.head.bias)


def test_the_net_itself_stays_as_it_was_and_shares_nothing():
    net = untidy(conv_bn())
    x, x_adv, y = batch(8)
    with unchanged(net):
        for by in ("sensitivity", "margin", "noise_corrected", "random"):
            mask = choose_units(net, x, x_adv, y, ["act1", "act2"], 0.3, by, fill="mean")
        twin = masked(net, mask)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
    assert [sum(~keep).item() for keep in mask.keep.values()] == [2, 2]
    assert feature_layers(twin, x) == feature_layers(net, x)  # the same names


class Explicit(nn.Module):
    """The mask written out: a product."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.keep = keep.float().view(1, -1, 1, 1)

    def forward(self, act: Tensor) -> Tensor:
        return act * self.keep


def test_attacks_go_through_the_mask():
    """PGD on the masked net finds, bit for bit, what it finds on a net in which the mask is written out."""
    net, x, x_adv, y, _ = attacked(n=16)
    mask = choose_units(net, x, x_adv, y, ["act1", "act2"], 0.4, "sensitivity")
    explicit = copy.deepcopy(net)
    for layer, keep in mask.keep.items():
        setattr(explicit, layer, nn.Sequential(getattr(net, layer), Explicit(keep)))
    attack = PGD(Linf(0.05), steps=5, start="none")
    found = attack(masked(net, mask), x, y)
    assert torch.equal(found, attack(explicit, x, y))
    assert not torch.equal(found, attack(net, x, y))


@pytest.mark.parametrize("fill", [0.0, 0.3])
def test_gradients_through_the_mask_are_true(fill):
    keep = {"act1": torch.tensor([True, False, True]), "act2": torch.tensor([True, True, False, True])}
    fills = {layer: torch.full((len(units),), fill, dtype=torch.float64) for layer, units in keep.items()}
    twin = masked(smooth(), UnitMask(keep, fills))
    x = torch.rand(3, 2, 6, 6, generator=seeded(1), dtype=torch.float64)
    for mode in (True, False):
        twin.train(mode)
        differences.check(twin, lambda: differences.weighted(twin(x)))
    image = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(differences.weighted(twin(image)), image)
    direction = torch.randn(x.shape, generator=seeded(4), dtype=x.dtype)
    ends = [differences.weighted(twin(x + sign * 1e-6 * direction)).item() for sign in (1, -1)]
    assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_the_mask_is_part_of_the_state_dict_and_of_copies(tmp_path: Path):
    net, x, x_adv, y, _ = attacked(n=8)
    mask = choose_units(net, x, x_adv, y, ["act2"], 0.4, fill="mean")
    twin = masked(net, mask)
    expected = twin(x)
    assert not torch.equal(expected, net(x))
    torch.save(twin.state_dict(), tmp_path / "masked.pt")
    other = choose_units(net, x, x_adv, y, ["act2"], 0.4, "random", seed=5)
    fresh = masked(conv_bn(), other).eval()
    fresh.load_state_dict(torch.load(tmp_path / "masked.pt", weights_only=True))
    assert torch.equal(fresh(x), expected)
    for duplicate in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert torch.equal(duplicate(x), expected)
        duplicate.act2.unit_keep.fill_(True)  # its own mask
        assert torch.equal(duplicate(x), net(x))
    assert torch.equal(twin(x), expected)


def test_fine_tuning_learns_around_the_mask():
    net, x, x_adv, y, _ = attacked(n=32)
    mask = choose_units(net, x, x_adv, y, ["act2"], 0.5, "margin")
    twin = masked(net, mask)
    data = images(256, seed=7)
    batches = list(zip(data[0].split(64), data[1].split(64), strict=True))
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def accuracy() -> float:
        held_out = images(256, seed=8)
        return (twin.eval()(held_out[0]).argmax(1) == held_out[1]).double().mean().item()

    cost = accuracy()
    losses = fine_tune(twin, batches, Defense(PGD(Linf(0.02), 2), {"ce": AdversarialCE()}), epochs=8, lr=0.05)
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]
    assert accuracy() > cost + 0.1
    assert not twin.training
    obs = observe(twin, x, x_adv, y, layers=["act2"])
    assert torch.equal((obs.adv.acts["act2"] == 0).all(3).all(2).all(0), ~mask.keep["act2"])  # masked units stay silent
    assert torch.equal(twin.act2.unit_keep, mask.keep["act2"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_errors():
    net, *data = planted()
    with pytest.raises(ValueError, match=r"masking\.layers: the network has no layer 'unit'; close names: units"):
        choose_units(net, *data, ["unit"], 0.25)
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=r"masking\.share: expected a share in \(0, 1\), found"):
            choose_units(net, *data, ["units"], share)
    with pytest.raises(ValueError, match="mask: all 4 units of layer 'units' would be masked; mask a smaller share"):
        choose_units(net, *data, ["units"], 0.9)
    with pytest.raises(
        ValueError, match=r"masking\.by: expected sensitivity, margin, noise_corrected or random; found 'luck'"
    ):
        choose_units(net, *data, ["units"], 0.25, "luck")
    with pytest.raises(ValueError, match=r"masking\.fill: expected zero or mean, found 'one'"):
        choose_units(net, *data, ["units"], 0.25, fill="one")
    with pytest.raises(ValueError, match=r"masking\.layers: expected at least one layer name"):
        choose_units(net, *data, [], 0.25)
    three = UnitMask({"units": torch.tensor([True, False, True])}, {"units": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"mask: made for 3 units, but the layer gives shape \(40, 4, 8, 8\)"):
        masked(net, three)(data[0])
    with pytest.raises(ValueError, match="mask: the network has no layer 'gone'"):
        masked(net, UnitMask({"gone": three.keep["units"]}, {"gone": torch.zeros(3)}))
    with pytest.raises(ValueError, match="mask: layer 'units' is masked already"):
        masked(masked(net, three), three)
    with pytest.raises(ValueError, match=r"mask: expected keep \(C,\) bool and fill \(C,\) of layer 'units'"):
        UnitMask(three.keep, {})
    with pytest.raises(ValueError, match=r"masking\.batches: expected at least one batch in epoch 1"):
        fine_tune(conv_bn(), iter([batch()[::2]]), Defense(None, {"ce": CleanCE()}), epochs=2)


def test_weights_keep_protected_units_unless_nothing_else_is_left() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.rand(8, 1, 4, 4)
    x_adv, y = (x + 0.1).clamp(0, 1), torch.zeros(8, dtype=torch.long)
    scores = unit_scores(net, x, x_adv, y, ["0"], "random", seed=3)["0"]
    best, second = scores.topk(2).indices.tolist()
    protect = torch.ones(4)
    protect[best] = 0.0
    mask = choose_units(net, x, x_adv, y, ["0"], 0.25, "random", weights={"0": protect}, seed=3)
    assert (~mask.keep["0"]).nonzero().flatten().tolist() == [second]
    everything = choose_units(net, x, x_adv, y, ["0"], 0.25, "random", weights={"0": torch.ones(4)}, seed=3)
    assert (~everything.keep["0"]).nonzero().flatten().tolist() == [best]  # weights of one change nothing


def test_units_named_by_hand_are_those_that_are_silenced():
    net, x, _, _ = planted()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mask = mask_of(net, x[:2], "units", [1, 3])
    assert (mask.keep["units"].tolist(), mask.fill["units"].tolist(), mask.by) == (
        [True, False, True, False],
        [0.0] * 4,
        "hand",
    )
    with torch.no_grad():
        inside, kept = masked(net, mask).units(x), net.units(x)
    assert torch.equal(inside[:, [0, 2]], kept[:, [0, 2]])
    assert not inside[:, [1, 3]].any()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("units", [[], [4], [-1], [0, 1.5]])
def test_units_by_hand_are_checked(units):
    net, x, _, _ = planted()
    with pytest.raises(ValueError, match=r"masking\.units: expected units 0 to 3 of layer 'units'"):
        mask_of(net, x[:2], "units", units)


@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_net_is_refused_for_its_hooks_would_not_be_called(inside) -> None:
    net = conv_bn().eval()
    x = batch()[0]
    mask = mask_of(net, x, "act1", [0])
    if inside:
        net.act1.compile(backend="eager")
    with pytest.raises(ValueError, match=r"mask: expected a net that torch\.compile has not compiled"):
        masked(net if inside else torch.compile(net, backend="eager"), mask)
