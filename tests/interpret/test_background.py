"""The background: chosen within twice the best radius, run in any batches, and honest about what it does not cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from glassarmor.interpret.profiles.background import (
    Background,
    background_features,
    choose_background,
    class_perception,
    class_spacing,
    pooled,
    relative_distance,
)
from tests.reference import profiles as reference
from tests.reference.nets import Residual, conv_bn, seeded, unchanged, untidy

POINTS = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=8)


def vit() -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=6, mlp_dim=8, num_classes=5
    )
    nn.init.normal_(net.heads.head.weight)  # zero as built
    return net


def images(n: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 3, size, size, generator=seeded(1)), torch.arange(n) % 5


# Choice.


@given(points=POINTS, count=st.integers(1, 8))
def test_k_centre_is_within_twice_the_best_radius(points, count):
    features = torch.tensor(points, dtype=torch.float32)
    choice = choose_background(features, torch.zeros(len(points), dtype=torch.long), count)
    count = min(count, len(points))
    picks = choice.indices.tolist()
    assert len(set(picks)) == len(picks) == count
    true_radius = float(torch.cdist(features, features[picks]).amin(1).max())
    assert choice.radius[0] == pytest.approx(true_radius, abs=1e-4)
    assert choice.radius[0] <= 2 * reference.best_radius(features.double().numpy(), count) + 1e-4


def test_choice_class_by_class_begins_in_the_middle_and_covers_far_groups():
    line = torch.tensor([0.0, 1, 2, 3, 4, 100, 101, -50])[:, None]
    features = torch.cat([line, line + 1000])
    labels = torch.tensor([3] * 8 + [1] * 8)
    choice = choose_background(features, labels, 3)
    assert choice.indices.tolist() == [12, 14, 15, 4, 6, 7]  # nearest to the mean of 8.25; then the two far groups
    assert labels[choice.indices].tolist() == [1, 1, 1, 3, 3, 3]
    assert choice.radius == {1: 4.0, 3: 4.0}
    assert torch.equal(choose_background(features, labels, 3).indices, choice.indices)
    assert choose_background(features, labels, 50).radius == {1: 0.0, 3: 0.0}
    assert sorted(choose_background(features, labels, 50).indices.tolist()) == list(range(16))


def test_more_images_cover_better_than_random_ones():
    features = torch.randn(400, 2, generator=seeded(2)) * torch.tensor([1.0, 5.0])
    labels = torch.zeros(400, dtype=torch.long)
    radii = [choose_background(features, labels, count).radius[0] for count in (5, 20, 80)]
    assert radii[0] > radii[1] > radii[2]
    chance = torch.randperm(400, generator=seeded(3))[:20]
    assert radii[1] < float(torch.cdist(features, features[chance]).amin(1).max())


def test_choices_that_cannot_be():
    with pytest.raises(ValueError, match="per_class: expected at least 1, found 0"):
        choose_background(torch.zeros(3, 2), torch.zeros(3), 0)
    with pytest.raises(ValueError, match=r"labels: expected 3.*found 2"):
        choose_background(torch.zeros(3, 2), torch.zeros(2), 1)


# Features.


def test_pooling_over_positions():
    act = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(act), act.mean((2, 3)))
    torch.testing.assert_close(pooled(act[:, 0]), act[:, 0].mean(2))
    assert pooled(act[:, 0, 0]).shape == (2, 5)
    assert pooled(act.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("sizes", [[11], [1, 4, 6], [5, 5, 1]])
def test_features_do_not_depend_on_the_batches_and_the_net_is_left_alone(sizes):
    net, (x, y) = untidy(Residual()), images(11)
    layers = ["head", "block1", "stem"]
    with unchanged(net):
        found = background_features(net, zip(x.split(sizes), y.split(sizes), strict=True), layers)
    net.eval()
    assert list(found.features) == ["stem", "block1", "head"]  # in execution order
    assert torch.equal(found.labels, y)
    assert found.ids == tuple(map(str, range(11)))
    torch.testing.assert_close(found.features["stem"], net.stem(x).mean((2, 3)))
    torch.testing.assert_close(found.features["head"], net(x))
    assert not any(phi.requires_grad for phi in found.features.values())
    assert found.counts(6).tolist() == [3, 2, 2, 2, 2, 0]


def test_tokens_are_found_by_themselves():
    net, (x, y) = vit().eval(), images(5)
    layers = ["conv_proj", "encoder.layers.encoder_layer_0", "encoder.ln", "heads"]
    found = background_features(net, [(x, y)], layers, ids="abcde")
    assert [phi.shape[1] for phi in found.features.values()] == [6, 6, 6, 5]
    tokens = net.encoder(torch.cat([net.class_token.expand(5, -1, -1), net._process_input(x)], 1))
    torch.testing.assert_close(found.features["encoder.ln"], tokens.mean(1))
    assert found.ids == tuple("abcde")
    whole = background_features(net, [(x, y)], layers, flatten=True)
    torch.testing.assert_close(whole.features["encoder.ln"], tokens.mT.flatten(1))


def test_backgrounds_that_cannot_be():
    net, (x, y) = conv_bn(), images(4)
    with pytest.raises(ValueError, match="background: expected at least one batch"):
        background_features(net, [], ["act1"])
    with pytest.raises(ValueError, match=r"ids: expected 4.*found 1"):
        background_features(net, [(x, y)], ["act1"], ids=["a"])
    with pytest.raises(ValueError, match="no layer 'act9'"):
        background_features(net, [(x, y)], ["act9"])


def test_features_made_under_inference_mode_can_be_used():
    net, (x, y) = conv_bn(), images(4)
    with torch.inference_mode():
        found = background_features(net, [(x, y)], ["act1"])
    assert class_spacing(found.features["act1"], found.labels, 5).isinf().all()


# Perception and coverage.


def planted(n: int = 12, classes: int = 3, seed: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n * classes) % classes
    centres = torch.tensor([[0.0, 0, 0], [20, 0, 0], [0, 20, 0]])
    return centres[labels] + torch.randn(len(labels), 3, generator=seeded(seed)), labels


def test_perception_on_planted_clusters():
    features, labels = planted()
    points = torch.tensor([[0.0, 0, 0], [20, 0, 0], [10, 0, 0]])
    distances = torch.cdist(points, features)
    share = [class_perception(distances, labels, torch.full((3,), c), 12).tolist() for c in range(3)]
    assert [s[:2] for s in share] == [[1, 0], [0, 1], [0, 0]]
    assert share[0][2] + share[1][2] == pytest.approx(1)  # between two clusters, none of the third
    assert 0 < share[0][2] < 1
    everything = class_perception(distances, labels, torch.zeros(3, dtype=torch.long), 36)
    torch.testing.assert_close(everything, torch.full((3,), 1 / 3))
    for neighbours in (0, 37):
        with pytest.raises(ValueError, match=r"neighbours: expected 1\.\.36"):
            class_perception(distances, labels, labels[:3], neighbours)


def test_perception_and_distance_equal_the_slow_formulas():
    features, labels = planted()
    points, wanted = torch.randn(7, 3, generator=seeded(5)) * 8, torch.arange(7) % 3
    distances, spacing = torch.cdist(points, features), class_spacing(features, labels, 4)
    rows = list(zip(points.double().numpy(), wanted.tolist(), strict=True))
    slow = features.double().numpy(), labels.numpy()
    found = class_perception(distances, labels, wanted, 5)
    np.testing.assert_allclose(found, [reference.nearest_share(p, *slow, c, 5) for p, c in rows], rtol=1e-6)
    found = relative_distance(distances, labels, spacing, wanted)
    np.testing.assert_allclose(found, [reference.relative_distance(p, *slow, c) for p, c in rows], rtol=1e-4)
    assert spacing[3].isinf()


def test_images_like_the_background_are_covered_and_others_are_not():
    features, labels = planted(n=60)
    spacing = class_spacing(features, labels, 3)
    fresh, own = planted(n=40, seed=6)
    usual = relative_distance(torch.cdist(fresh, features), labels, spacing, own)
    assert (usual <= 1).float().mean() > 0.85
    wrong = relative_distance(torch.cdist(fresh, features), labels, spacing, (own + 1) % 3)
    assert (wrong > 3).all()
    assert relative_distance(torch.cdist(features[:5], features), labels, spacing, labels[:5]).max() < 1e-2


def test_classes_of_unequal_size():
    features, labels = planted(n=10)
    keep = (labels == 0) | (torch.arange(30) < 8)
    spacing = class_spacing(features[keep], labels[keep], 3)
    alone = [class_spacing(features[keep & (labels == c)], labels[keep & (labels == c)], 3)[c] for c in range(3)]
    torch.testing.assert_close(spacing, torch.stack(alone))


def test_background_says_how_to_treat_other_images():
    act = torch.randn(2, 3, 4)
    assert torch.equal(Background({}, torch.zeros(1), ()).phi(act), act.mean(2))
    assert torch.equal(Background({}, torch.zeros(1), (), flattened=True).phi(act), act.flatten(1))
