"""Activation Profiles: closed forms on a net built for them, the slow float64 formulas, real nets, the warnings."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glassarmor.interpret.modes import undisturbed
from glassarmor.interpret.observation import Forward, Observation, observe
from glassarmor.interpret.profiles.background import Background, background_features
from glassarmor.interpret.profiles.profiles import (
    QUANTILES,
    ActivationProfiles,
    activation_profiles,
    compare,
    coverage_warnings,
    evidence_position,
    pooled,
    second_axis,
    strength_positions,
    turning_layer,
)
from glassarmor.interpret.signals.sensitivity import strength_curves
from tests.interpret.test_background import images, vit
from tests.reference import profiles as reference
from tests.reference.nets import Residual, batch, seeded, unchanged, untidy


def test_the_evidence_axis_is_zero_at_the_true_centroid_and_one_at_the_targets() -> None:
    start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 4.0]])
    for features, expected in (([1.0, 0.0], 0.0), ([1.0, 4.0], 1.0), ([9.0, 1.0], 0.25), ([1.0, -4.0], -1.0)):
        assert evidence_position(torch.tensor([features]), start, end).item() == expected


def test_a_layer_is_pooled_over_positions_only() -> None:
    act = torch.arange(24.0).view(2, 3, 2, 2)
    assert torch.equal(pooled(act), act.mean((2, 3)))
    assert torch.equal(pooled(act[:, :, 0, 0]), act[:, :, 0, 0])


def test_the_turning_layer_is_the_first_from_which_the_adversarial_line_stays_over() -> None:
    clean = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.9], [0.2, 0.2, 0.6, 0.2, 0.9], [0.1, 0.1, 0.2, 0.1, 0.9]])
    adv = torch.tensor([[0.7, 0.2, 0.2, 0.2, 0.9], [0.3, 0.8, 0.8, 0.3, 0.9], [0.9, 0.9, 0.9, 0.4, 0.9]])
    #  came back and left again → last; stays from 1; from 1, but there the clean line is over too → 2; never; clean over
    assert turning_layer(clean, adv).tolist() == [2, 1, 2, -1, -1]


# A net whose layers stand where its image says.


class Between(nn.Module):
    """Layer l places an image at pixel l between two centroids of its own, whatever the layers below did.

    Its map (N, 6, 2, 2) also varies over positions, by a pattern whose mean is 0, and across the axis with the last pixel.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        generator = seeded(layer)
        zero, one, across = torch.randn(3, 6, generator=generator)
        self.zero, self.way = zero, one - zero
        self.across = across - (across @ self.way) / (self.way @ self.way) * self.way
        self.pattern = torch.randn(6, 2, 2, generator=generator)
        self.pattern -= self.pattern.mean((1, 2), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        phi = self.zero + x[:, self.layer, None] * self.way + (x[:, -1, None] - 0.5) * self.across
        return phi[..., None, None] + self.pattern


class Placed(nn.Module):
    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Between(layer) for layer in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [step(x) for step in self.steps]
        return outputs[-1].mean((2, 3))[:, :2]


LAYERS = tuple(f"steps.{i}" for i in range(5))


def placed(lines: list[list[float]]) -> Tensor:
    """Images (N, 1, 4, 4) whose first five pixels are the positions at the five layers."""
    x = torch.zeros(len(lines), 16)
    x[:, :5] = torch.tensor(lines)
    x[:, -1] = 0.5
    return x.view(-1, 1, 4, 4)


def two_classes(each: int = 20) -> tuple[Tensor, Tensor]:
    """Background images about 0 (class 0) and about 1 (class 1), exactly so in the mean."""
    noise = torch.randn(each // 2, 16, generator=seeded(9)) * 0.05
    noise = torch.cat([noise, -noise])
    noise[:, -1] *= 3  # so that this is what varies most across the axis
    x = torch.cat([noise, 1 + noise])
    x[:, -1] = torch.cat([noise[:, -1], noise[:, -1]]) + 0.5
    return x.view(-1, 1, 4, 4), torch.arange(2 * each) // each


CLEAN = [[0.1, 0.2, 0.0, 0.1, 0.0], [0.3, 0.4, 0.6, 0.2, 0.1], [1.0, 0.9, 0.8, 1.0, 0.9]]
ADV = [[0.2, 0.7, 0.4, 0.6, 1.2], [0.6, 0.6, 0.7, 0.8, 0.9], [0.9, 0.8, 0.6, 0.2, 0.0]]


def test_positions_and_turning_layers_are_exact_on_a_net_that_interpolates():
    net = Placed()
    x, x_adv = placed(CLEAN), placed(ADV)
    y, target = torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0])
    background = background_features(net, [two_classes()], LAYERS)
    with torch.no_grad():
        obs = observe(net, x, x_adv, y, target=target, layers=LAYERS)
    found = activation_profiles(obs, background, neighbours=5)
    expected = {side: np.array(lines).T for side, lines in (("clean", CLEAN), ("adv", ADV))}
    for lines in expected.values():
        lines[:, 2] = 1 - lines[:, 2]  # from class 1 to class 0
    np.testing.assert_allclose(found.clean, expected["clean"], atol=1e-5)
    np.testing.assert_allclose(found.adv, expected["adv"], atol=1e-5)
    # The first came back at layer 2 and left for good at 3; the second is over ½ from the start, as is its clean line at 2
    # alone; the third leaves at 3.
    assert found.turning.tolist() == [3, 0, 3]
    assert found.turning_shares.tolist() == pytest.approx([1 / 3, 0, 0, 2 / 3, 0, 0])
    assert found.layers == LAYERS
    assert found.pairs.tolist() == [[0, 1], [1, 0]]
    assert found.pair.tolist() == [0, 0, 1]
    assert (found.clean_second.abs() < 1e-4).all()  # these images stand in the middle of what varies across
    # Perception flips where the line crosses: all neighbours are of the nearer cluster.
    assert torch.equal(found.adv_perception[..., 1], (found.adv > 0.5).float())
    assert torch.equal(found.clean_perception.sum(2), torch.ones(5, 3))
    # The classes' own bands: 0 and 1 in the middle, and symmetric around.
    torch.testing.assert_close(found.bands.mean(3)[..., 0], torch.zeros(5, 2), atol=0.02, rtol=0)
    torch.testing.assert_close(found.median_path[..., 1], torch.ones(5, 2), atol=0.02, rtol=0)
    assert ((found.spread > 0.02) & (found.spread < 0.12)).all()
    assert (found.bands.diff(dim=3) > 0).all()


def test_the_second_axis_is_where_the_background_varies_most_across():
    net = Placed()
    background = background_features(net, [two_classes()], LAYERS)
    x = placed([[0.0] * 5] * 3)
    x.view(3, -1)[:, -1] = torch.tensor([0.5, 0.9, 0.1])
    with torch.no_grad():
        obs = observe(net, x, x, torch.tensor([0, 0, 0]), target=torch.tensor([1, 1, 1]), layers=LAYERS)
    found = activation_profiles(obs, background)
    std = (two_classes()[0].flatten(1)[:, -1]).std(correction=0)
    torch.testing.assert_close(
        found.clean_second.abs(), (x.flatten(1)[:, -1] - 0.5).abs().expand(5, 3) / std, rtol=1e-3, atol=1e-4
    )
    assert (found.clean_second[:, 1] * found.clean_second[:, 2] < 0).all()
    torch.testing.assert_close(found.clean, torch.zeros(5, 3), atol=1e-5, rtol=0)  # and the first does not see it


@pytest.mark.parametrize(("rows", "units"), [(60, 12), (9, 40)])
def test_the_second_axis_equals_a_full_decomposition(rows, units):
    features = torch.randn(rows, units, generator=seeded(3)) * torch.linspace(3, 0.5, units)
    axes = torch.randn(4, units, generator=seeded(4)) * 7
    found = second_axis(features - features.mean(0), axes)
    torch.testing.assert_close((found * axes).sum(1), torch.zeros(4), atol=1e-4, rtol=0)
    for axis, v in zip(axes.double().numpy(), found.double().numpy(), strict=True):
        np.testing.assert_allclose(v, reference.second_axis(features.double().numpy(), axis), atol=5e-3)
    assert second_axis(features, torch.full((1, units), torch.nan)).isnan().all()


def test_the_second_axis_of_a_background_that_varies_in_few_directions():
    """Two directions, one of them the axis: nothing but rounding is left for a third."""
    features = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 2, 0, 0], [0, -2, 0, 0]])
    found = second_axis(features, torch.tensor([[1.0, 0, 0, 0], [0, 5, 0, 0]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0]]))


# Against the slow formulas.


def measured(seed: int = 0) -> tuple[Observation, Background, ActivationProfiles]:
    generator = seeded(seed)
    shapes = {"map": (6, 3, 3), "tokens": (6, 5), "flat": (4,)}
    y, target = torch.tensor([0, 0, 1, 2, 2, 1]), torch.tensor([1, 2, 0, 0, 1, 0])
    labels = torch.tensor([0, 1, 2] * 7 + [0, 0])
    clean = {layer: torch.randn(6, *shape, generator=generator) for layer, shape in shapes.items()}
    adv = {layer: act + torch.randn(act.shape, generator=generator) for layer, act in clean.items()}
    units = {"map": 6, "tokens": 6, "flat": 4}
    features = {
        layer: 0.4 * torch.randn(23, n, generator=generator) + torch.randn(3, n, generator=generator)[labels]
        for layer, n in units.items()
    }
    x, logits = torch.zeros(6, 1, 1, 1), torch.zeros(6, 3)
    obs = Observation(y, target, Forward(x, logits, adv), Forward(x, logits, clean))
    background = Background(features, labels, tuple(map(str, range(23))))
    return obs, background, activation_profiles(obs, background, neighbours=4)


def test_equal_the_slow_formulas():
    obs, background, found = measured()
    labels = background.labels.numpy()
    assert found.counts.tolist() == [9, 7, 7]
    for index, layer in enumerate(found.layers):
        phi = background.features[layer].double().numpy()
        axes = {"map": (2, 3), "tokens": (2,), "flat": ()}[layer]
        clean, adv = (obs.side(side).acts[layer].double().numpy() for side in ("clean", "adv"))
        for n in range(6):
            true, target = int(obs.y[n]), int(obs.target[n])
            start, end = (reference.mean_of(phi, labels, label) for label in (true, target))
            for side, act in (("clean", clean), ("adv", adv)):
                point = act[n].mean(tuple(a - 1 for a in axes)) if axes else act[n]
                near = getattr(found, f"{side}_perception")[index, n]
                far = getattr(found, f"{side}_distance")[index, n]
                shares = [reference.nearest_share(point, phi, labels, label, 4) for label in (true, target)]
                far_off = [reference.relative_distance(point, phi, labels, label) for label in (true, target)]
                second = reference.second_position(point, phi, end - start)
                assert getattr(found, side)[index, n] == pytest.approx(reference.position(point, start, end), abs=1e-4)
                assert getattr(found, f"{side}_second")[index, n] == pytest.approx(second, abs=5e-3)
                assert near.tolist() == pytest.approx(shares)
                assert far == pytest.approx(far_off[0] if side == "clean" else min(far_off), rel=1e-3)
            assert found.divergence[index, n] == pytest.approx(reference.divergence(clean[n], adv[n]), rel=1e-5)
            for which, label in enumerate((true, target)):
                along = [reference.position(row, start, end) for row in phi[labels == label]]
                bands = found.bands[index, found.pair[n], which]
                np.testing.assert_allclose(bands, np.quantile(along, QUANTILES), atol=1e-4)
        by_unit = reference.unit_divergence(clean, adv, 1)
        np.testing.assert_allclose(found.unit_divergence[layer], by_unit, rtol=1e-4)
        total = found.unit_divergence[layer].square().mean()
        torch.testing.assert_close(total, found.divergence[index].square().mean())
    for n in range(6):
        lines = found.clean[:, n].double().numpy(), found.adv[:, n].double().numpy()
        assert found.turning[n] == reference.turning(*lines)


def test_the_same_numbers_every_time():
    _, _, first = measured()
    _, _, second = measured()
    state = torch.get_rng_state()
    for field in fields(ActivationProfiles):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, Tensor):
            assert a.shape == b.shape
            assert a.numpy().tobytes() == b.numpy().tobytes(), field.name
    assert torch.equal(torch.get_rng_state(), state)


# Coverage.


def test_coverage_falls_and_a_warning_appears_when_the_background_lacks_the_class():
    net = Placed()
    x, y = two_classes(160)
    shown = torch.arange(320) % 4 == 0
    with torch.no_grad():
        obs = observe(net, x[shown], x[shown], y[shown], target=1 - y[shown], layers=LAYERS)
    whole = activation_profiles(obs, background_features(net, [(x[~shown], y[~shown])], LAYERS))
    assert whole.coverage.min() > 0.8
    assert coverage_warnings(whole) == ()
    only = ~shown & (y == 0)
    lacking = activation_profiles(obs, background_features(net, [(x[only], y[only])], LAYERS))
    assert lacking.coverage.tolist() == pytest.approx((whole.clean_distance[:, y[shown] == 0] <= 1).sum(1).div(80).tolist())
    assert lacking.coverage.max() <= 0.5
    assert lacking.adv.isnan().all()
    assert lacking.bands[:, :, 0].isnan().all()
    assert (lacking.turning == -1).all()
    assert coverage_warnings(lacking, ("cat", "dog")) == (
        "The background holds fewer than two images of dog: lines towards or from there mean nothing. Add training images "
        "of it.",
    )


def test_a_background_of_other_images_is_warned_about():
    net = Placed()
    x, y = two_classes(40)
    with torch.no_grad():
        obs = observe(net, x + 0.4, x, y, target=1 - y, layers=LAYERS)
    found = activation_profiles(obs, background_features(net, [(x, y)], LAYERS))
    assert (found.coverage < 0.3).any()
    worst = int(found.coverage.argmin())
    (warning,) = coverage_warnings(found)
    assert warning.startswith(
        f"At layer steps.{worst} the background of 80 images covers {100 * found.coverage[worst]:.0f} % "
    )


# Real nets.


@pytest.mark.parametrize(("make", "layers"), [
    (Residual, ("stem", "block1", "block2.bn", "block2", "norm")),
    (vit, ("conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1.mlp", "encoder.ln", "heads")),
])  # fmt: skip
@pytest.mark.parametrize("flatten", [False, True])
def test_branching_nets_and_transformers(make, layers, flatten):
    net = untidy(make())
    x, x_adv, y = batch(n=6, size=16)
    with unchanged(net):
        background = background_features(net, [images(40)], layers, flatten=flatten)
        with undisturbed(net):
            obs = observe(net, x, x_adv, y, layers=layers)
            found = activation_profiles(obs, background)
        path = strength_positions(net, x, x_adv, y, obs.target, background, points=3, chunk=6)
    assert found.layers == tuple(background.features)
    for field in fields(ActivationProfiles):
        value = getattr(found, field.name)
        assert not isinstance(value, Tensor) or (not value.requires_grad and value.isfinite().all()), field.name
    assert {layer: len(units) for layer, units in found.unit_divergence.items()}[layers[0]] == 6
    torch.testing.assert_close(path[0], found.clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(path[-1], found.adv, atol=1e-4, rtol=1e-4)


def test_the_strength_path_equals_the_positions_of_the_strength_curves():
    net, layers = Residual().eval(), ("block1", "block2")
    x, x_adv, y = batch(n=4)
    background = background_features(net, [images(20, size=8)], layers)
    target = (y + 1) % 5
    path = strength_positions(net, x, x_adv, y, target, background, points=5)
    curves = strength_curves(net, x, x_adv, layers, points=5)
    for index, layer in enumerate(layers):
        start, end = (
            torch.stack([background.features[layer][background.labels == c].mean(0) for c in label]) for label in (y, target)
        )
        for s in range(5):
            expected = evidence_position(curves.units[layer][s], start, end)
            torch.testing.assert_close(path[s, index], expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        again = strength_positions(net, x, x_adv, y, target, background, points=5, chunk=4)
    torch.testing.assert_close(again, path, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="points: expected at least 2, found 1"):
        strength_positions(net, x, x_adv, y, target, background, points=1)


def test_layers_that_were_not_observed():
    obs, background, _ = measured()
    more = Background({**background.features, "head": torch.zeros(23, 2)}, background.labels, background.ids)
    with pytest.raises(ValueError, match="layers: head are in the background, but were not observed"):
        activation_profiles(obs, more)


# Comparison.


def lines(clean: list[list[float]], adv: list[list[float]], y: tuple[int, ...] = (0, 0)) -> ActivationProfiles:
    """Profiles of which only the lines matter, given by layer."""
    _, _, template = measured()
    values = {field.name: getattr(template, field.name) for field in fields(ActivationProfiles)}
    c, a = torch.tensor(clean), torch.tensor(adv)
    values |= {"clean": c, "adv": a, "y": torch.tensor(y), "turning": turning_layer(c, a)}
    return ActivationProfiles(**values | {"layers": tuple(f"layer{i}" for i in range(len(clean)))})


def test_two_networks_on_one_axis():
    a = lines([[0.0, 0.0]] * 3, [[0.2, 0.9], [0.8, 0.9], [1.0, 0.9]])
    b = lines([[0.0, 0.2]] * 5, [[0.1, 0.1], [0.2, 0.1], [0.2, 0.3], [0.3, 0.4], [1.0, 0.4]])
    found = compare(a, b)
    assert found.depth.tolist() == [0, 0.25, 0.5, 0.75, 1]
    torch.testing.assert_close(found.adv[0, :, 0], torch.tensor([0.2, 0.5, 0.8, 0.9, 1.0]))
    assert torch.equal(found.adv[1], b.adv)
    torch.testing.assert_close(found.clean[1], b.clean)
    torch.testing.assert_close(found.difference[:, 0], torch.tensor([-0.1, -0.3, -0.6, -0.6, 0.0]))
    assert found.turning[:, 0].tolist() == [0.5, 1.0]
    assert found.later[0] == 0.5
    assert found.later[1].isnan()  # turns in a alone
    assert found.turned == {"both": 1, "a": 1, "b": 0, "neither": 0}
    same = compare(a, a)
    assert torch.equal(same.adv[0], a.adv)
    assert same.later.tolist() == [0, 0]
    single = compare(lines([[0.0, 0.0]], [[0.9, 0.1]]), a)
    assert single.turning[0, 0] == 0
    assert single.adv[0].tolist() == torch.tensor([[0.9, 0.1]]).expand(3, 2).tolist()
    with pytest.raises(
        ValueError, match=r" expected examples of the same classes on both sides, found \[0, 0\] and \[1, 0\]"
    ):
        compare(a, lines([[0.0, 0.0]], [[1.0, 1.0]], y=(1, 0)))
