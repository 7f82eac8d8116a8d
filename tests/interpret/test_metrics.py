"""Running statistics over unequal batches are those of all samples at once."""

from __future__ import annotations

import pytest
import torch

from glassarmor.interpret.observation import observe
from glassarmor.interpret.signals.running import ClassCentroids, RunningSensitivity, TurningCounts
from glassarmor.interpret.signals.sensitivity import relative_unit_sensitivity
from tests.reference.nets import batch, conv_bn, seeded


def test_centroids_are_the_means_of_all_samples_of_a_class():
    features, y = torch.randn(11, 3, generator=seeded()), torch.tensor([0, 0, 1, 3, 3, 3, 1, 0, 1, 1, 3])
    centroids = ClassCentroids(4, 3)
    for part, labels in zip(features.split([5, 1, 5]), y.split([5, 1, 5]), strict=True):
        centroids.update(part, labels)
    found = centroids.compute()
    for label in (0, 1, 3):
        torch.testing.assert_close(found[label], features[y == label].mean(0))
    assert found[2].isnan().all()  # never seen
    assert found.dtype == torch.float32
    fresh = ClassCentroids(4, 3)
    fresh.load_state_dict(centroids.state_dict())
    fresh.update(features[:1], y[:1])
    torch.testing.assert_close(fresh.compute()[0], features[[0, 0, 1, 7]].mean(0))


def test_turning_layers_are_counted_and_none_is_none():
    counts = TurningCounts(3)
    for turned in ([0, 2, -1], [], [2, -1, -1, 2]):
        counts.update(torch.tensor(turned, dtype=torch.long))
    assert counts.compute().tolist() == [1, 0, 3]
    assert TurningCounts(3).load_state_dict(counts.state_dict()).missing_keys == []


@pytest.mark.parametrize("silent", [0.0, 0.5])
def test_running_sensitivity_is_that_of_all_images_silent_units_too(silent):
    net = conv_bn().eval()
    with torch.no_grad():
        net.bn2.weight[2] *= 1e-2  # hardly varies
        net.bn2.bias[2] = 1.0
    x, x_adv, y = batch(n=9)
    running = RunningSensitivity(8, silent)
    for rows in (slice(0, 2), slice(2, 9)):
        running.update(observe(net, x[rows], x_adv[rows], y[rows], layers=["act2"]), "act2")
    expected = relative_unit_sensitivity(observe(net, x, x_adv, y, layers=["act2"]), "act2", silent).detach()
    torch.testing.assert_close(running.compute(), expected, rtol=1e-3, atol=1e-5)
    assert (expected[2] == 0) == (silent > 0)
