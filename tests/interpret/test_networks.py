"""Every signal on every family of networks, against own hooks, own axes and plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from glassarmor.defenses import PGD, PSE, AdversarialCE, CAMDiscrepancy, Defense, Linf, UnitSensitivity
from glassarmor.defenses.masking import mask_of, masked
from glassarmor.interpret import (
    class_activation_map,
    conductance,
    feature_layers,
    observe,
    position_effects,
    strength_curves,
    unit_effects,
    unit_patching,
    unit_sensitivity,
)
from glassarmor.interpret.concepts.dissection import dissect
from glassarmor.interpret.network.layouts import UnknownLayout, declare_layouts, layouts_of
from glassarmor.interpret.network.structure import structure
from glassarmor.interpret.profiles.background import background_features
from glassarmor.interpret.views.panels.cam import CAMPanel, exact
from glassarmor.interpret.views.view import Probe
from tests.reference.families import FAMILIES, Cells, Family, Registers, canonical, images

LARGE = {
    *("EfficientNet", "MobileNet v3", "GoogLeNet with auxiliary heads", "MaxViT", "Swin v2"),
    *("hybrid of ResNet and ViT (timm)", "Swin (timm)", "ConvNeXt (timm)", "MLP-Mixer (timm)"),
    *("DenseNet", "DeiT, distilled (timm)", "spectral norm", "own cell in a loop", "row transformer"),
}
NAMES = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LARGE else []) for name in FAMILIES]
)


def built(name: str) -> tuple[Family, nn.Module]:
    torch.manual_seed(0)
    return FAMILIES[name], FAMILIES[name].make().eval()


def own_pass(net: nn.Module, layers: Sequence[str], x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Logits and the raw outputs of layers, by hooks of the test's own."""
    kept: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: str, output: object) -> object:
        first = output if isinstance(output, Tensor) else output[0]
        kept[layer].append(first)
        other = first.clone()
        return other if output is first else (other, *output[1:])

    handles = [
        net.get_submodule(layer).register_forward_hook(lambda _m, _i, out, layer=layer: keep(layer, out)) for layer in layers
    ]
    logits = net(x)
    for handle in handles:
        handle.remove()
    return logits, kept


def whole(outputs: Sequence[Tensor], axes: str) -> Tensor:
    """(N, C, positions…): the calls of a cell are time steps."""
    return canonical(outputs[0], axes) if len(outputs) == 1 else torch.stack(list(outputs), -1)


class Own:
    """Activations and gradients of every layer, by the test's own hooks."""

    def __init__(self, family: Family, net: nn.Module, x: Tensor, labels: Tensor) -> None:
        logits, kept = own_pass(net, list(family.layers), x.clone().requires_grad_())
        flat = [(layer, output) for layer, outputs in kept.items() for output in outputs]
        slopes = torch.autograd.grad(
            logits.gather(1, labels[:, None]).sum(), [output for _, output in flat], allow_unused=True
        )
        found: dict[str, list[Tensor]] = {layer: [] for layer in kept}
        for (layer, output), slope in zip(flat, slopes, strict=True):
            found[layer].append(torch.zeros_like(output) if slope is None else slope)
        self.logits = logits.detach()
        self.act = {layer: whole(outputs, family.layers[layer]).detach() for layer, outputs in kept.items()}
        self.slope = {layer: whole(outputs, family.layers[layer]) for layer, outputs in found.items()}


@NAMES
def test_the_default_layers(name: str) -> None:
    family, net = built(name)
    found = feature_layers(net, images(family)[0])
    assert not family.default or found == family.default
    layouts = layouts_of(net, images(family)[0], found)
    assert set(layouts) == set(found)


@NAMES
def test_activations_gradients_and_what_is_made_of_them(name: str) -> None:
    family, net = built(name)
    x, x_adv, y = images(family)
    obs = observe(net, x, x_adv, y, layers=list(family.layers))
    own = {
        (side, label): Own(family, net, at, obs.labels(label))
        for side, at in (("clean", x), ("adv", x_adv))
        for label in ("true", "target")
    }
    for layer in family.layers:
        clean, adv = own["clean", "true"].act[layer], own["adv", "true"].act[layer]
        torch.testing.assert_close(obs.clean.acts[layer], clean)
        torch.testing.assert_close(obs.adv.acts[layer], adv)
        positions = tuple(range(2, clean.dim()))
        moved = (adv - clean).abs()
        moved = moved.mean(positions) if positions else moved
        torch.testing.assert_close(unit_sensitivity(obs, layer).detach(), moved.mean(0), rtol=1e-4, atol=1e-6)
        gained = {}
        for label in ("true", "target"):
            for side in ("clean", "adv"):
                torch.testing.assert_close(
                    obs.layer_gradient(layer, side, label), own[side, label].slope[layer], rtol=1e-4, atol=1e-6
                )
            slope = 0.5 * (own["clean", label].slope[layer] + own["adv", label].slope[layer])
            gained[label] = slope * (adv - clean)
        units, places = unit_effects(obs, layer), None
        torch.testing.assert_close(
            units.promotion, gained["target"].flatten(2).sum(2) if positions else gained["target"], rtol=1e-3, atol=1e-6
        )
        if positions:
            places = position_effects(obs, layer)
            torch.testing.assert_close(places.suppression, -gained["true"].sum(1), rtol=1e-3, atol=1e-6)
        if obs.spatial(layer):
            size = math.prod(obs.layout(layer).grid)
            product = (own["adv", "true"].slope[layer] * adv).sum(1).flatten(1)[:, family.prefix.get(layer, 0) :]
            assert product.shape[1] == size
            torch.testing.assert_close(
                class_activation_map(obs, layer), size * product.unflatten(1, obs.layout(layer).grid), rtol=1e-3, atol=1e-6
            )
        else:
            with pytest.raises(ValueError, match="no positions that form a map"):
                class_activation_map(obs, layer)


@NAMES
def test_conductance_along_the_path(name: str) -> None:
    family, net = built(name)
    x, x_adv, y = images(family)
    target = (y + 1) % 5
    found = conductance(net, x, x_adv, y, target, layers=list(family.layers), steps=2, chunk=4)
    points = [Own(family, net, torch.lerp(x, x_adv, s), target) for s in (0.0, 0.5, 1.0)]
    for layer in family.layers:
        by_hand = sum(0.5 * (a.slope[layer] + b.slope[layer]) * (b.act[layer] - a.act[layer]) for a, b in pairwise(points))
        units = by_hand.flatten(2).sum(2) if by_hand.dim() > 2 else by_hand
        torch.testing.assert_close(found.units[layer].promotion, units, rtol=1e-3, atol=1e-6)


@NAMES
def test_one_unit_set_back_to_clean(name: str) -> None:
    family, net = built(name)
    x, x_adv, y = images(family)
    target = (y + 1) % 5
    for layer, axes in list(family.layers.items())[:3]:
        if layer in family.calls:
            with pytest.raises(ValueError, match="ran twice in one forward"):
                unit_patching(net, x, x_adv, y, target, layer=layer)
            continue
        if isinstance(net.get_submodule(layer), nn.RNNBase):
            with pytest.raises(ValueError, match="must return one tensor of 3 rows, found tuple"):
                unit_patching(net, x, x_adv, y, target, layer=layer)
            continue
        found = unit_patching(net, x, x_adv, y, target, layer=layer)
        with torch.no_grad():
            before, kept = own_pass(net, [layer], x)
            attacked = net(x_adv)
        clean = whole(kept[layer], axes)
        for unit in (0, clean.shape[1] - 1):

            def patch(_module, _inputs, output, unit=unit, clean=clean, axes=axes):  # type: ignore[no-untyped-def]
                first = output if isinstance(output, Tensor) else output[0]
                other = first.clone()
                canonical(other, axes)[:, unit] = clean[:, unit]
                return other if output is first else (other, *output[1:])

            handle = net.get_submodule(layer).register_forward_hook(patch)
            with torch.no_grad():
                patched = net(x_adv)
            handle.remove()
            rows = torch.arange(len(x))
            torch.testing.assert_close(found.promotion[:, unit], (attacked - patched)[rows, target], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            found.total_suppression, (before - attacked)[torch.arange(len(x)), y], rtol=1e-3, atol=1e-5
        )


@NAMES
def test_means_over_positions_by_strength_and_for_profiles(name: str) -> None:
    family, net = built(name)
    x, x_adv, y = images(family)
    layers = list(family.layers)
    curves = strength_curves(net, x, x_adv, layers, points=3)
    background = background_features(net, [(x, y)], layers)
    for i, at in enumerate((x, torch.lerp(x, x_adv, 0.5), x_adv)):
        with torch.no_grad():
            _, kept = own_pass(net, layers, at)
        for layer, axes in family.layers.items():
            act = whole(kept[layer], axes)
            mean = act.flatten(2).mean(2) if act.dim() > 2 else act
            torch.testing.assert_close(curves.units[layer][i], mean, rtol=1e-4, atol=1e-5)
            if i == 0:
                torch.testing.assert_close(background.features[layer], mean, rtol=1e-4, atol=1e-5)


@NAMES
def test_a_masked_unit_answers_zero_and_the_others_what_they_did(name: str) -> None:
    family, net = built(name)
    x = images(family)[0]
    for layer, axes in family.layers.items():
        twin = masked(net, mask_of(net, x, layer, [1])).eval()
        with torch.no_grad():
            _, before = own_pass(net, [layer], x)
            _, after = own_pass(twin, [layer], x)
        expected, found = canonical(before[layer][0], axes).clone(), canonical(after[layer][0], axes)
        expected[:, 1] = 0
        torch.testing.assert_close(found, expected)


class Annotated:
    concepts, categories = ("left", "right"), ("side", "side")

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self):  # type: ignore[no-untyped-def]
        half = self.x.shape[-1] // 2
        labels = torch.zeros(len(self.x), 1, *self.x.shape[-2:], dtype=torch.long)
        labels[..., half:] = 1
        yield self.x, labels


@NAMES
def test_dissection_sees_units_on_their_maps(name: str) -> None:
    family, net = built(name)
    x = images(family)[0]
    for layer, axes in family.layers.items():
        layout = layouts_of(net, x, [layer])[layer]
        if not layout.spatial and (len(axes) > 2 or layer in family.calls):
            with pytest.raises(ValueError, match="dissection needs a map"):
                dissect(net, Annotated(x), [layer], quantile=0.1, top=1)
            continue
        found = dissect(net, Annotated(x), [layer], quantile=0.1, top=1)[layer]
        with torch.no_grad():
            _, kept = own_pass(net, [layer], x)
        act = whole(kept[layer], axes).flatten(2) if len(axes) > 2 else whole(kept[layer], axes)[..., None]
        act = act[..., family.prefix.get(layer, 0) :]
        torch.testing.assert_close(found.top_values[:, 0], act.amax((0, 2)))
        assert math.prod(found.map_size) == act.shape[2]


@NAMES
def test_regularisers_train(name: str) -> None:
    """Second derivatives exist: fused attention has none."""
    family, net = built(name)
    x, _, y = images(family, n=4)
    layers = feature_layers(net, x)
    terms = {"pse": PSE(0.5), "sensitivity": UnitSensitivity(0.1)}
    with torch.no_grad():
        obs = observe(net, x, x, y, layers=layers)
    if obs.spatial(layers[-1]):
        terms["cam"] = CAMDiscrepancy(0.1)
    defense = Defense(attack=PGD(Linf(0.03), steps=1), loss={"ce": AdversarialCE()}, regularizers=terms)
    defense.prepare(net, x, y)
    net.train()
    defense.at(0, 0)
    result = defense(net, x, y)
    result.loss.backward()
    slopes = [p.grad for p in net.parameters() if p.grad is not None]
    assert result.loss.isfinite()
    assert all(slope.isfinite().all() for slope in slopes)
    assert sum(float(slope.abs().sum()) for slope in slopes) > 0


@NAMES
def test_the_drawing_of_the_net(name: str) -> None:
    family, net = built(name)
    drawn = structure(net, images(family)[0])
    assert {"input"} <= {node.kind for node in drawn.nodes}
    assert drawn.unused == 0 or name.startswith("GoogLeNet")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_defense_has_the_same_value_where_lightning_validates(mode) -> None:
    family, net = built("ViT (torchvision)")
    x, _, y = images(family)
    terms = {"pse": PSE(), "sensitivity": UnitSensitivity(), "cam": CAMDiscrepancy()}

    def value() -> float:
        torch.manual_seed(0)
        return float(Defense(PGD(Linf(0.03), steps=2), {"ce": AdversarialCE()}, terms)(net, x, y).loss.detach())

    expected = value()
    with mode():
        assert value() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "layer", "exactly"),
    [("flatten and linear head", "3", True), ("ViT (torchvision)", "encoder.layers.encoder_layer_1", False)],
)
def test_the_cam_panel_says_whether_its_maps_sum_to_the_logit(name: str, layer: str, exactly: bool) -> None:
    family, net = built(name)
    x, x_adv, y = images(family)
    obs = observe(net, x, x_adv, y, layers=[layer])
    probe = Probe(net, obs, (layer,), ("a", "b", "c"), tuple("abcde"), {})
    view = CAMPanel(layer)(probe)
    assert exact(view.scalars["cam/explained"]) == exactly
    assert ("The mean of a map is the class's logit" in view.how_to_read) == exactly
    assert ("logits, the target's by" in view.headline) == exactly


class Displaced(nn.Module):
    """Places put elsewhere between two convolutions; ``move`` works on (N, C, H, W)."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.moved, self.second = nn.Conv2d(3, 6, 2, 2), nn.Identity(), nn.Conv2d(6, 8, 1)
        self.move, self.head = move, nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.moved(self.move(self.first(x)))).flatten(1))


@pytest.mark.parametrize(
    ("move", "placed"),
    [
        (lambda z: z, True),
        (lambda z: z.relu() + 1, True),
        (lambda z: z[:, :, ::2, ::2], True),
        (lambda z: nn.functional.pad(z, (1, 1, 0, 1)), True),
        (lambda z: z.roll((2, 3), (2, 3)).roll((-2, -3), (2, 3)), True),
        (lambda z: z.flip(2).flip(2), True),
        (lambda z: z.flip(1), True),  # units alone
        (lambda z: z.flip(3), False),
        (lambda z: torch.flip(z, (2,)), False),
        (lambda z: z.roll(3, 2), False),
        (lambda z: torch.roll(z, (1, 1), (2, 3)), False),
        (lambda z: z[:, :, torch.tensor([3, 1, 0, 2, 4, 5, 6, 7])], False),
        (lambda z: z.index_select(3, torch.arange(8).flip(0)), False),
        (lambda z: z.sort(3).values, False),
        (lambda z: z.topk(8, 2).values, False),
        (lambda z: z.gather(3, z.argsort(3)), False),
        (lambda z: nn.functional.pad(z, (0, 5)), False),
        (lambda z: z[:, :, :4, :4], False),
        (lambda z: z.flatten(2).flip(2).unflatten(2, (8, 8)), False),
        (lambda z: torch.rot90(z, 1, (2, 3)), False),
    ],
)
def test_a_map_is_shown_only_where_its_places_are_those_of_the_image(move, placed) -> None:
    net = Displaced(move)
    x = torch.rand(2, 3, 16, 16)
    net(x)
    layout = layouts_of(net.eval(), x, ["moved"])["moved"]
    assert layout.axes.startswith("NC")
    assert layout.spatial == placed
    assert layouts_of(net, x, ["second"])["second"].spatial == placed


class LastState(nn.Module):
    """The usual classifier of a sequence: it reads the state, not the sequence of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(16, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, 0])[1][0][-1])


class FeaturesFirst(nn.Module):
    """Returns what nobody reads before what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {"features": features, "logits": self.head(features.mean((2, 3)))}


class Pick(nn.Module):
    def forward(self, output: dict[str, Tensor]) -> Tensor:
        return output["logits"] * 1


def test_of_several_tensors_the_one_that_is_read_is_recorded_trained_and_masked() -> None:
    torch.manual_seed(0)
    net = LastState().eval()
    x = torch.rand(3, 1, 16, 16)
    x_adv, y = (x + 0.05).clamp(0, 1), torch.arange(3)
    obs = observe(net, x, x_adv, y, layers=["rnn"])
    state = net.rnn(x_adv[:, 0])[1][0][-1]
    torch.testing.assert_close(obs.adv.acts["rnn"].squeeze(2), state)
    slope = net.head.weight[y].detach()
    torch.testing.assert_close(obs.layer_gradient("rnn").squeeze(2), slope)
    found = conductance(net, x, x_adv, y, (y + 1) % 5, layers=["rnn"], steps=2)
    change = (state - net.rnn(x[:, 0])[1][0][-1]).detach()
    torch.testing.assert_close(found.units["rnn"].suppression, -slope * change, rtol=1e-3, atol=1e-6)
    twin = masked(net, mask_of(net, x, "rnn", list(range(11))))
    with torch.no_grad():
        kept = state.clone()
        kept[:, :11] = 0
        torch.testing.assert_close(twin(x_adv), net.head(kept))
    assert feature_layers(net, x) == ("rnn",)
    defense = Defense(PGD(Linf(0.03), steps=1), {"ce": AdversarialCE()}, {"pse": PSE(), "s": UnitSensitivity()})
    assert defense(net.train(), x, y).loss.isfinite()
    inside = layouts_of(nn.Sequential(FeaturesFirst(), Pick()), x)
    assert (inside["0"].entry, inside["0"].axes) == (1, "NC")


class SharedNorm(nn.Module):
    """One norm for the position embedding, which has no row an image, and for the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 16, 12))
        self.embed, self.norm, self.fc, self.head = nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x[:, 0]) + self.norm(self.place)
        return self.head(self.fc(self.norm(tokens)).mean(1))


@pytest.mark.parametrize("n", [3, 1, 16])  # also as many images as the embedding has rows, and as places
def test_patching_keeps_the_calls_of_a_shared_module_apart(n: int) -> None:
    torch.manual_seed(0)
    net = SharedNorm().eval()
    x = torch.rand(n, 1, 16, 16)
    x_adv, y = (x + 0.1 * torch.randn(x.shape)).clamp(0, 1), torch.arange(n) % 5
    found = unit_patching(net, x, x_adv, y, (y + 1) % 5, layer="fc")
    with torch.no_grad():
        clean, act = (net.fc(net.norm(net.embed(z[:, 0]) + net.norm(net.place))) for z in (x, x_adv))
        for unit in (0, 7):
            patched = act.clone()
            patched[..., unit] = clean[..., unit]
            by_hand = (net(x_adv) - net.head(patched.mean(1))).gather(1, ((y + 1) % 5)[:, None])[:, 0]
            torch.testing.assert_close(found.promotion[:, unit], by_hand, rtol=1e-3, atol=1e-5)
    with pytest.raises(UnknownLayout, match="it runs on the images and on weights alike"):
        observe(net, x, x, y, layers=["norm"])


class Windows(nn.Module):
    """Rows in two windows, all first ones before all second ones; and together again."""

    def __init__(self) -> None:
        super().__init__()
        self.mark, self.head = nn.Identity(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat(self.mark(torch.cat(x[:, 0].split(8, 1))).chunk(2), 1).mean(1))


def test_a_declaration_that_does_not_count_the_images_is_refused() -> None:
    net, x, y = Windows(), torch.rand(3, 1, 16, 16), torch.arange(3)
    declare_layouts(net, {"mark": "NTC"})
    with pytest.raises(UnknownLayout, match=r"shape \(6, 8, 16\) for 3 images that axis N does not count them"):
        observe(net, x, x, y, layers=["mark"])


def test_what_cannot_be_told_is_refused_with_what_to_say() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x[:, 0]).abs()

    net = nn.Sequential(Silent(), nn.Flatten(), nn.Linear(16 * 9, 5))
    x = torch.rand(2, 1, 16, 16)
    with pytest.raises(UnknownLayout, match=r'units and which positions cannot be told: .*layouts=\{"0": "N\?\?"\}'):
        observe(net, x, x, torch.tensor([0, 1]), layers=["0"])
    declare_layouts(net, {"0": "NTC"})
    assert observe(net, x, x, torch.tensor([0, 1]), layers=["0"]).adv.acts["0"].shape == (2, 9, 16)
    with pytest.raises(ValueError, match=r"layouts\.0: expected a letter for each axis"):
        declare_layouts(net, {"0": "tokens"})
    with pytest.raises(ValueError, match="the network has no layer 'none'"):
        declare_layouts(net, {"none": "NTC"})
    declare_layouts(net, {"0": "NTTC"})
    with pytest.raises(UnknownLayout, match="the layouts say NTTC, 4 axes, but its shape is"):
        observe(net, x, x, torch.tensor([0, 1]), layers=["0"])


def test_a_declaration_goes_along_with_copies() -> None:
    net = Registers()
    declare_layouts(net, {"embed": "NCT"})
    x = torch.rand(2, 3, 32, 32)
    assert layouts_of(net, x, ["embed"])["embed"].axes == "NCT"
    from copy import deepcopy

    assert layouts_of(deepcopy(net), x, ["embed"])["embed"].axes == "NCT"


def test_a_cell_that_runs_less_often_later_is_refused() -> None:
    net = Cells(nn.GRUCell(16, 12)).eval()
    x = torch.rand(2, 1, 16, 16)
    layouts = layouts_of(net, x, ["cell"])
    assert layouts["cell"].calls == 16
    from glassarmor.interpret import record

    with pytest.raises(ValueError, match="recorded nothing"), record(net, ["cell"], layouts):
        net(x[:, :, :8])
