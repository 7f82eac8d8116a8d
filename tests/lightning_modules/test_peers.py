"""Gates of the architecture peers: closed forms, true gradients through the gate, no labels, no chance in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glassarmor.datamodules.loader import TensorLoader
from glassarmor.defenses.attacks.pgd import FGSM, FGSMRS, PGD
from glassarmor.defenses.evaluation.adaptive import AdaptivePGD
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.auxiliary import AuxiliaryCE
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.terms import AdversarialCE
from glassarmor.interpret.observation import feature_layers, observe, record
from glassarmor.lightning_modules.classifier import RobustClassifier
from glassarmor.lightning_modules.networks.check import check_network
from glassarmor.lightning_modules.networks.peers import CASGate, CIFSGate, FSRGate, Gated, gated
from glassarmor.lightning_modules.networks.resnet import ResNet
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from tests.reference.differences import check
from tests.reference.losses import cross_entropy, softmax
from tests.reference.nets import seeded, smooth

MEAN, STD = (0.4,), (0.3,)
GATES: dict[str, Callable[..., nn.Module]] = {
    "cas": CASGate,
    "cas argmax": partial(CASGate, select="argmax"),
    "cifs": CIFSGate,
    "fsr": FSRGate,
    "fsr, soft": partial(FSRGate, temperature=1.0),
}
each = pytest.mark.parametrize("gate", list(GATES.values()), ids=list(GATES))
own = pytest.mark.parametrize("gate", [CASGate, CIFSGate, FSRGate])


def small(gate: Callable[..., nn.Module], seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    base = partial(SmallCNN, width=0.25)
    return gated(num_classes=4, in_channels=1, mean=MEAN, std=STD, base=base, gate=gate, **options)


def features(n: int = 3, channels: int = 5, side: int = 4) -> Tensor:
    return torch.rand(n, channels, side, side, generator=seeded(1)) * 2


def squares(n: int = 32) -> tuple[Tensor, Tensor]:
    """Four classes that a small net learns at once: which corner is bright."""
    y = torch.arange(n) % 4
    x = torch.rand(n, 1, 16, 16, generator=seeded(2)) * 0.3
    for i, c in enumerate(y.tolist()):
        x[i, 0, 8 * (c // 2) : 8 * (c // 2) + 8, 8 * (c % 2) : 8 * (c % 2) + 8] += 0.5
    return x, y


# -- what the gates compute ------------------------------------------------------------------------------------------


def test_cas_multiplies_channels_by_the_weights_of_the_classes_it_sees() -> None:
    x = features()
    gate, hard = CASGate(channels=5, num_classes=3), CASGate(channels=5, num_classes=3, select="argmax")
    hard.load_state_dict(gate.state_dict())
    m = gate.classifier.weight.detach().double().numpy()
    for i, sample in enumerate(x.double().numpy()):
        logits = m @ sample.mean((1, 2))
        expected = sample * (np.array(softmax(logits)) @ m)[:, None, None]
        np.testing.assert_allclose(gate(x)[i].detach().numpy(), expected, rtol=1e-5)
        expected = sample * m[logits.argmax()][:, None, None]
        np.testing.assert_allclose(hard(x)[i].detach().numpy(), expected, rtol=1e-5)


def test_without_its_gate_cas_leaves_the_features_and_keeps_its_head() -> None:
    x = features()
    gate = CASGate(channels=5, num_classes=3, select="none")
    seen = []
    gate.logits.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert gate(x) is x
    torch.testing.assert_close(seen[0], gate.classifier(x.mean((2, 3))))


def test_cas_starts_open_and_the_offset_predicts_nothing() -> None:
    gate = CASGate(channels=64, num_classes=10)
    weight = gate.classifier.weight
    assert (weight.mean() - 1).abs() < 0.05
    pooled = torch.rand(4, 64)
    torch.testing.assert_close(
        F.linear(pooled, weight).softmax(1), F.linear(pooled, weight - 1).softmax(1), atol=1e-5, rtol=0
    )


def test_cifs_importance_is_the_gradient_of_the_soft_maximum() -> None:
    gate = CIFSGate(channels=5, num_classes=3).double()
    pooled = features().double().mean((2, 3)).requires_grad_()
    soft_maximum = gate.classifier(F.softplus(gate.hidden(pooled))).logsumexp(1).sum()
    (expected,) = torch.autograd.grad(soft_maximum, pooled)
    torch.testing.assert_close(gate.importance(pooled), expected)


def test_cifs_mask_in_closed_form_and_rising_with_importance() -> None:
    x = features()
    gate = CIFSGate(channels=5, num_classes=3, sharpness=1.5)
    g = gate.importance(x.mean((2, 3))).detach().double().numpy()
    mask = (gate(x) / x).mean((2, 3)).detach().double().numpy()
    for importance, opened in zip(g, mask, strict=True):
        relative = importance / np.sqrt((importance**2).mean())
        np.testing.assert_allclose(opened, 2 / (1 + np.exp(-1.5 * relative)), rtol=1e-4)
        assert (np.argsort(importance) == np.argsort(opened)).all()


def test_cifs_without_importance_lets_everything_pass() -> None:
    gate = CIFSGate(channels=5, num_classes=3)
    nn.init.zeros_(gate.classifier.weight)
    torch.testing.assert_close(gate(features()), features())


def constant_fsr(score: float, repair: float, temperature: float) -> FSRGate:
    """Every feature scored alike and repaired alike."""
    gate = FSRGate(channels=5, num_classes=3, temperature=temperature)
    for part, value in ((gate.separation, score), (gate.recalibration, repair)):
        nn.init.zeros_(part[-1].weight)
        nn.init.constant_(part[-1].bias, value)
    return gate


def test_fsr_in_closed_form_with_a_constant_score() -> None:
    """m·A + (1 − m)·A + (1 − m)·r = A + (1 − m)·r."""
    gate = constant_fsr(score=0.3, repair=2.0, temperature=0.5).eval()
    with record(gate, ["robust", "nonrobust", "recalibrated"]) as heads:
        found = gate(features())
    m = 1 / (1 + np.exp(-0.6))
    torch.testing.assert_close(found, features() + (1 - m) * 2)
    pooled = features().mean((2, 3))
    for name, part in (("robust", m * pooled), ("nonrobust", (1 - m) * pooled), ("recalibrated", (1 - m) * (pooled + 2))):
        torch.testing.assert_close(heads[name], gate.classifier(part))


def test_fsr_draws_gumbel_noise_in_training_only() -> None:
    """A gate opens with probability sigmoid(score), whatever the temperature."""
    gate = constant_fsr(score=0.8, repair=1.0, temperature=0.1)
    x = torch.ones(50, 5, 8, 8)
    m = 1 - (gate.train()(x) - x).detach()
    assert (m > 0.5).float().mean().item() == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.015)  # of 16,000 draws
    assert m.std() > 0.3
    assert not torch.equal(gate(x), gate(x))
    gate.eval()
    assert torch.equal(gate(x), gate(x))


# -- an ordinary net: gradients, names, determinism --------------------------------------------------------------------


def smooth_net(gate: Callable[..., nn.Module]) -> nn.Module:
    """Softplus and tanh, in float64, gated behind its second activation."""
    net = smooth()
    torch.manual_seed(3)
    net.act2 = Gated(net.act2, gate(channels=4, num_classes=3).double())
    for module in net.modules():  # no kinks: the step of the differences must not cross one
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
    return net.eval()


def slope(net: nn.Module, h: float = 1e-6) -> tuple[float, float]:
    """Directional derivative of the loss along a direction of the image: by autograd and by differences."""
    x = torch.rand(3, 2, 6, 6, generator=seeded(1), dtype=torch.float64).requires_grad_()
    direction = torch.randn(x.shape, generator=seeded(5), dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
    with torch.no_grad():
        ends = [float(F.cross_entropy(net(x + sign * h * direction), y)) for sign in (1, -1)]
    return float((gradient * direction).sum()), (ends[0] - ends[1]) / (2 * h)


@each
def test_input_gradients_are_true_through_the_gate(gate) -> None:
    found, numeric = slope(smooth_net(gate))
    assert abs(numeric) > 1e-3
    assert found == pytest.approx(numeric, rel=1e-5)


@each
def test_weight_gradients_are_true_through_the_gate(gate) -> None:
    net = smooth_net(gate)
    x, y = torch.rand(3, 2, 6, 6, generator=seeded(1), dtype=torch.float64), torch.tensor([0, 1, 2])
    weights = tuple(name for name, _ in net.named_parameters() if name.startswith(("act2.gate", "conv1.weight")))
    assert len(weights) > 1
    check(net, lambda: F.cross_entropy(net(x), y), weights)


def test_the_published_mask_hides_its_gradient_and_nothing_else() -> None:
    open_net, hidden = smooth_net(CIFSGate), smooth_net(partial(CIFSGate, detach=True))
    with torch.no_grad():
        open_net.act2.gate.classifier.weight.mul_(10)  # a probe that is sure of something
    hidden.load_state_dict(open_net.state_dict())
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    assert torch.equal(open_net(x), hidden(x))
    found, numeric = slope(hidden)
    assert abs(found - numeric) > 0.02 * abs(numeric)
    assert slope(open_net) == (pytest.approx(numeric, rel=1e-5), numeric)


@each
def test_evaluation_is_deterministic_and_needs_no_graph(gate) -> None:
    net, (x, _) = small(gate).eval(), squares(4)
    first = net(x)
    with torch.inference_mode():  # no autograd inside the forward
        assert torch.equal(net(x), first)
    torch.testing.assert_close(net(x[2:]), first[2:], msg="a sample sees its neighbours")


@own
def test_names_stages_and_maps_are_those_of_an_ordinary_net(gate) -> None:
    net, (x, y) = small(gate).eval(), squares(4)
    assert feature_layers(net, x) == net.feature_layers == ("stage1", "stage2", "stage3")
    acts = observe(net, x, x, y, layers=["stage3", "stage3.layer"]).adv.acts
    torch.testing.assert_close(net.head(acts["stage3"].mean((2, 3))), net(x), atol=1e-5, rtol=0)
    assert acts["stage3.layer"].shape == acts["stage3"].shape
    assert not torch.equal(acts["stage3.layer"], acts["stage3"])
    check_network(net, (1, 16, 16), 4)


def test_any_network_and_layer_can_be_gated() -> None:
    base = partial(ResNet, (1, 1, 1, 1), (4, 8, 8, 16))
    plain = base(num_classes=4, in_channels=3, mean=[0.5] * 3, std=[0.2] * 3)
    for layer, channels in (("layer2", 8), ("layer3.0.relu1", 8), (None, 16)):
        net = gated(num_classes=4, in_channels=3, mean=[0.5] * 3, std=[0.2] * 3, base=base, gate=CASGate, layer=layer)
        place = net.get_submodule(layer or "layer4")
        assert isinstance(place, Gated)
        assert place.gate.classifier.weight.shape == (4, channels)
        assert type(net) is type(plain)
        assert all(module.training for module in net.modules())
        inner = {name.replace(".layer.", ".") for name in net.state_dict()}
        assert set(plain.state_dict()) <= inner | set(net.state_dict())


def test_the_base_net_starts_as_it_would_without_gate() -> None:
    torch.manual_seed(0)
    plain = SmallCNN(width=0.25, num_classes=4, in_channels=1, mean=MEAN, std=STD).state_dict()
    found = {name.replace("stage3.layer", "stage3"): value for name, value in small(FSRGate).state_dict().items()}
    assert all(torch.equal(value, found[name]) for name, value in plain.items())


# -- training ----------------------------------------------------------------------------------------------------------


def defense(**options: object) -> Defense:
    return Defense(FGSMRS(Linf(0.05)), {"ce": AdversarialCE()}, {"auxiliary": AuxiliaryCE(**options)})


def test_the_term_is_the_cross_entropy_of_every_head() -> None:
    net, (x, y) = small(FSRGate).eval(), squares(5)
    term = AuxiliaryCE(1.0)
    term.prepare(observe(net, x, x, y), ())
    assert set(term.layers) == {f"stage3.gate.{name}" for name in ("robust", "nonrobust", "recalibrated")}
    obs = observe(net, x, (x + 0.1).clamp(0, 1), y, layers=term.layers)
    for i, found in enumerate(term(obs).tolist()):
        wrong = max((c for c in range(4) if c != y[i]), key=lambda c, i=i: obs.adv.logits[i, c].item())
        heads = {name.split(".")[-1]: act[i].tolist() for name, act in obs.adv.acts.items()}
        expected = cross_entropy(heads["robust"], int(y[i])) + cross_entropy(heads["recalibrated"], int(y[i]))
        assert found == pytest.approx(expected + cross_entropy(heads["nonrobust"], wrong), rel=1e-5)


def test_a_head_may_be_named() -> None:
    net, (x, y) = small(FSRGate).eval(), squares(5)
    term = AuxiliaryCE(1.0, layers="stage3.gate.nonrobust")
    obs = observe(net, x, x, y, layers=term.layers)
    term.prepare(obs, ())
    wrong = net(x).detach().scatter(1, y[:, None], -torch.inf).argmax(1)
    torch.testing.assert_close(term(obs), F.cross_entropy(obs.adv.acts[term.layers[0]], wrong, reduction="none"))


@pytest.mark.long
@own
def test_every_part_of_the_gate_learns_and_the_whole_learns_the_task(gate) -> None:
    net, (x, y) = small(gate), squares()
    trained = defense(weight=2.0)
    trained.prepare(net, x, y)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    net.train()
    for step in range(40):
        trained.at(0, step)
        optimizer.zero_grad()
        trained(net, x, y).loss.backward()
        if step == 0:
            parts = net.get_submodule("stage3.gate").named_parameters()
            assert [name for name, p in parts if p.grad is None or p.grad.abs().sum() == 0] == []
        optimizer.step()
    net.eval()
    x_adv = PGD(Linf(0.05), steps=5)(net, x, y)
    assert (net(x_adv).argmax(1) == y).float().mean() > 0.9
    with record(net, trained.layers) as heads:
        net(x)
    right = {name.split(".")[-1]: (logits.argmax(1) == y).float().mean() for name, logits in heads.items()}
    right.pop("recalibrated", None)  # without noise the gate may leave nothing to recalibrate
    assert right.pop("nonrobust", 0) < 0.1
    assert min(right.values()) > 0.9


def test_an_attack_that_knows_the_term_raises_it() -> None:
    net, (x, y) = small(CASGate).eval(), squares(8)
    terms = {"auxiliary": AuxiliaryCE(1.0)}

    def auxiliary(images: Tensor) -> Tensor:
        with record(net, ["stage3.gate.logits"]) as heads:
            net(images)
        return F.cross_entropy(heads["stage3.gate.logits"], y)

    plain = FGSM(Linf(0.05))(net, x, y)
    knowing = AdaptivePGD(Linf(0.05), terms, weight=100, steps=1, step_size=0.05, start="none")(net, x, y)
    assert auxiliary(knowing) > auxiliary(plain) > 0
    assert auxiliary(knowing) > auxiliary(x)


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path: Path) -> None:
    """FSR draws noise in training; the checkpoint loads with weights_only."""
    x, y = squares()
    images = (x * 255).to(torch.uint8)

    def fit(epochs: int, resume: Path | None = None) -> RobustClassifier:
        net = small(FSRGate)
        trained = defense()
        trained.prepare(net, x, y)
        module = RobustClassifier(net, trained, FGSM(Linf(0.05)), 4, partial(torch.optim.SGD, lr=0.05, momentum=0.9))
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        loader = TensorLoader(images, y, 16, shuffle=True, current_epoch=lambda: trainer.current_epoch)
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    fit(1)
    resumed, whole = fit(2, tmp_path / "1.ckpt").state_dict(), fit(2).state_dict()
    assert any("gate" in name for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


# -- what makes no sense -----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A net that runs one of its layers twice, and names no stages."""

    def __init__(self, num_classes: int, in_channels: int, mean: object, std: object) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(self.act(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (SmallCNN, {"layer": "stage4"}, r"network\.layer: the network has no layer 'stage4'; close names: stage3"),
        (SmallCNN, {"layer": 3}, r"network\.layer: the network has no layer 3"),
        (SmallCNN, {"layer": "head"}, r"network\.layer: .*\(N, C, H, W\), found 'head' with shape \(1, 4\)"),
        (Twice, {}, r"network\.layer: .*Twice.* conv.*found null"),
        (Twice, {"layer": "act"}, r"network\.layer: .*runs once.*'act': 2 times"),
        (partial(SmallCNN, width=0.25), {"image_size": 0}, r"network\.image_size: .*found 0"),
        (
            SmallCNN,
            {"gate": partial(CASGate, select="hard")},
            r"network\.gate\.select: expected soft, argmax, none; found 'hard'",
        ),
        (SmallCNN, {"gate": partial(CIFSGate, sharpness=0)}, r"network\.gate\.sharpness: .*found 0"),
        (SmallCNN, {"gate": partial(CIFSGate, detach="yes")}, r"network\.gate\.detach: .*found 'yes'"),
        (SmallCNN, {"gate": partial(FSRGate, temperature=float("nan"))}, r"network\.gate\.temperature: .*found nan"),
    ],
)
def test_what_makes_no_sense_is_refused(base, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        gated(**{"num_classes": 4, "in_channels": 1, "mean": MEAN, "std": STD, "base": base, "gate": CASGate, **options})


def test_a_net_without_heads_and_a_layer_without_logits_are_refused() -> None:
    x, y = squares(4)
    plain = SmallCNN(width=0.25, num_classes=4, in_channels=1, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"regularizers\.auxiliary: .*no auxiliary head.*network=cas, cifs or fsr"):
        defense().prepare(plain, x, y)
    with pytest.raises(ValueError, match=r"regularizers\.auxiliary\.layers: expected a head .*\(4, 4\), found 'stage3'"):
        defense(layers=["stage3"]).prepare(small(CASGate), x, y)
    with pytest.raises(ValueError, match=r"regularizers\.auxiliary\.layers: .*no layer 'stage3\.gate\.logit'"):
        defense(layers=["stage3.gate.logit"]).prepare(small(CASGate), x, y)
