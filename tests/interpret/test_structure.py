"""The graph of layers: branches, additions, reused modules, parameters and layouts of real nets; nothing is left behind."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from glassarmor.interpret.network.layouts import layouts_of
from glassarmor.interpret.network.structure import Structure, collapse, layout, open_to, overview, structure
from glassarmor.interpret.observation import record
from glassarmor.lightning_modules.networks.resnet import preact_resnet18, resnet18
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from tests.reference.nets import Residual, unchanged, untidy

DATA = {"num_classes": 5, "in_channels": 3, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [4, 4], num_classes=5)


class Inception(nn.Module):
    """Three branches and a functional pooling branch, joined by concatenation; one ReLU module used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.one = nn.Conv2d(4, 2, 1)
        self.three = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1))
        self.relu = nn.ReLU()
        self.spare = nn.Linear(7, 2)  # never runs
        self.scale = nn.Parameter(torch.ones(7, 1, 1))
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        pooled = F.max_pool2d(x, 3, 1, 1)[:, :2]
        x = torch.cat([self.relu(self.one(x)), self.three(x), pooled], 1)
        x = self.relu(x * self.scale)
        return self.head(torch.cat([x, x[:, :2]], 1).mean((2, 3)))


class Delicate(nn.Module):
    """What a careless tracer gets wrong: a value passed on unchanged and used again, and one that is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.same = nn.Identity()
        self.inner = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        inner = self.norm(self.inner(self.same(x)))
        inner += x
        self.relu(inner)  # its result is in ``inner``
        return self.head(inner.mean((2, 3)))


def edges(found: Structure) -> set[tuple[str, str]]:
    return {(found.nodes[a].name, found.nodes[b].name) for a, b in found.edges}


NETS = {
    "small_cnn": lambda: SmallCNN(**DATA),
    "resnet18": lambda: resnet18(**DATA),
    "preact": lambda: preact_resnet18(**DATA),
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "vit": vit,
    "swin": swin,
    "inception": Inception,
    "delicate": Delicate,
    "residual": Residual,
}


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_counts_once_and_the_net_is_left_alone(name):
    net = untidy(NETS[name]())
    state = torch.get_rng_state()
    with unchanged(net):
        found = structure(net, X)
    assert torch.equal(torch.get_rng_state(), state)
    total = sum(parameter.numel() for parameter in net.parameters())
    assert sum(node.parameters for node in found.nodes) + found.unused == total
    assert found.unused == (16 if name == "inception" else 0)
    assert len({node.name for node in (*found.nodes, *found.blocks)}) == len(found.nodes) + len(found.blocks)
    assert all(a < b for a, b in found.edges)
    assert {b for _, b in found.edges} == set(range(1, len(found.nodes)))  # all but the input read something
    assert {a for a, _ in found.edges} >= set(range(len(found.nodes) - 1)) - {
        i for i, node in enumerate(found.nodes) if node.kind == "attention"
    }


@pytest.mark.parametrize("name", NETS)
def test_observable_layers_are_those_that_can_be_recorded_in_the_order_in_which_they_are(name):
    net = NETS[name]().eval()
    found = structure(net, X)
    layers = found.layers()
    with torch.no_grad(), record(net, layers) as acts:
        net(X)
    assert tuple(acts) == layers
    shapes = {node.layer: node.shape for node in (*found.nodes, *found.blocks)}
    assert all(shapes[layer] == tuple(act.shape[1:]) for layer, act in acts.items())
    for node in (*found.nodes, *found.blocks):
        if node.layer and not node.observable:
            with pytest.raises(ValueError, match="layers"), torch.no_grad(), record(net, [node.layer]):
                net(X)


def test_small_cnn_is_a_line():
    found = structure(SmallCNN(**DATA), X)
    assert found.edges == tuple((i, i + 1) for i in range(len(found.nodes) - 1))
    assert [node.kind for node in found.nodes][:5] == ["input", "other", "conv", "norm", "activation"]
    conv = found.nodes[2]
    assert (conv.name, conv.layer, conv.type) == ("stage1.0.0", "stage1.0.0", "Conv2d")
    assert (conv.shape, conv.parameters, conv.parent, conv.depth) == ((16, 16, 16), 3 * 16 * 9, "stage1.0", 2)
    assert [block.name for block in found.blocks] == [
        *("stage1", "stage1.0", "stage1.1", "stage2", "stage2.0", "stage2.1", "stage3", "stage3.0", "stage3.1", "pool")
    ]
    assert [node.name for node in found.nodes[found.blocks[0].start : found.blocks[0].stop]] == [
        *(f"stage1.{i}.{j}" for i in range(2) for j in range(3))
    ]


def test_residual_additions_read_the_block_input():
    found = edges(structure(resnet18(**DATA), X))
    assert {("stem.2", "layer1.0.conv1"), ("stem.2", "layer1.0.shortcut"), ("layer1.0.shortcut", "layer1.0.add")} <= found
    assert {("layer1.0.bn2", "layer1.0.add"), ("layer1.0.add", "layer1.0.relu2")} <= found
    assert {b for a, b in found if a == "layer1.0.relu2"} == {"layer1.1.conv1", "layer1.1.shortcut"}
    torchs = edges(structure(torchvision.models.resnet18(num_classes=5), X))
    assert ("maxpool", "layer1.0.add") in torchs  # no module stands for that shortcut
    assert {a for a, b in torchs if b == "layer2.0.add"} == {"layer2.0.bn2", "layer2.0.downsample.1"}


def test_branches_functions_reuse_and_loose_parameters():
    found = structure(Inception(), X)
    assert [node.name for node in found.nodes] == [
        *("input", "stem", "relu", "max_pool2d", "one", "relu:2", "three.0", "three.1", "three.2"),
        *("cat", "mul", "relu:3", "cat:2", "mean", "head"),
    ]
    into = {node.name: sorted(a for a, b in edges(found) if b == node.name) for node in found.nodes}
    assert into["cat"] == ["max_pool2d", "relu:2", "three.2"]
    assert into["three.0"] == into["one"] == into["max_pool2d"] == ["relu"]
    assert into["cat:2"] == ["relu:3"]
    by_name = {node.name: node for node in found.nodes}
    assert by_name["mul"].parameters == 7
    assert [by_name[name].kind for name in ("cat", "mul", "max_pool2d", "mean")] == [
        *("concat", "multiply", "pooling", "pooling")
    ]
    assert not any(node.observable for node in found.nodes if node.layer == "relu")
    assert "three" in found.layers()


def test_values_passed_on_and_values_overwritten():
    found = edges(structure(Delicate(), X))
    assert {a for a, b in found if b == "add"} == {"norm", "first"}  # not "same", which gave back its input
    assert ("same", "inner") in found
    assert ("relu", "mean") in found
    assert ("add", "mean") not in found


def test_a_net_of_one_module_and_of_shared_weights():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.flatten(1)))

    found = structure(Tied(), torch.rand(2, 1, 2, 4))
    assert [node.parameters for node in found.nodes] == [0, 72, 8]
    alone = structure(nn.Conv2d(3, 4, 1), X)
    assert [(node.name, node.parameters, node.observable) for node in alone.nodes] == [
        *(("input", 0, False), ("Conv2d", 16, False))
    ]


def test_layouts_are_read_off_the_layers_around():
    def units_last(net: nn.Module) -> set[str]:
        return {name for name, each in layouts_of(net, X).items() if len(each.axes) > 2 and each.axes[-1] == "C"}

    for net in (SmallCNN(**DATA), resnet18(**DATA), Inception(), torchvision.models.shufflenet_v2_x0_5(num_classes=5)):
        assert units_last(net) == set()
    found = units_last(vit())
    assert {"encoder", "encoder.layers", "encoder.ln", "encoder.layers.encoder_layer_1", "encoder.dropout"} <= found
    assert not found & {"conv_proj", "heads", "heads.head"}
    channels_last = units_last(swin())
    assert {"features.0", "features.1", "features.1.0.attn", "features.2", "norm"} <= channels_last
    assert not channels_last & {"features.0.0", "permute", "avgpool", "flatten", "head"}


def test_collapsed_drawings():
    full = structure(resnet18(**DATA), X)
    outer = collapse(full, ())
    assert [node.name for node in outer.nodes] == [
        *("input", "normalize", "stem", "layer1", "layer2", "layer3", "layer4", "pool", "head")
    ]
    assert outer.edges == tuple((i, i + 1) for i in range(8))
    assert outer.nodes[3].kind == "block"
    assert outer.nodes[3].shape == (64, 32, 32)
    blocks = overview(full)
    assert [node.name for node in blocks.nodes][2:6] == ["stem", "layer1.0", "layer1.1", "layer2.0"]
    assert {block.name for block in blocks.blocks} == {"layer1", "layer2", "layer3", "layer4"}
    expanded = collapse(full, ("layer2", "layer2.0"))
    assert [node.name for node in expanded.nodes if node.parent == "layer2.0"] == [
        *(f"layer2.0.{name}" for name in ("conv1", "bn1", "relu1", "conv2", "bn2", "shortcut", "add", "relu2"))
    ]
    assert {("layer1", "layer2.0.shortcut"), ("layer2.0.shortcut", "layer2.0.add")} <= edges(expanded)
    for drawing in (outer, blocks, expanded):
        assert sum(node.parameters for node in drawing.nodes) == sum(node.parameters for node in full.nodes)
        for block in drawing.blocks:
            inside = drawing.nodes[block.start : block.stop]
            assert all(node.name.startswith(block.name + ".") for node in inside)
    assert collapse(full, [block.name for block in full.blocks]) == full
    assert collapse(full, open_to(full, 1)) == outer
    assert collapse(full, ("layer2.0",)) == outer  # shut in by layer2
    with pytest.raises(ValueError, match=r"opened: expected names of blocks .* found layer9"):
        collapse(full, ("layer9",))


@pytest.mark.parametrize("name", NETS)
def test_layout_gives_each_node_a_place_after_what_it_reads(name):
    full = structure(NETS[name](), X)
    for drawing in (full, overview(full)):
        places = layout(drawing)
        assert len(set(places)) == len(drawing.nodes)
        assert all(places[a][0] < places[b][0] for a, b in drawing.edges)
        longest = {0: 0}
        for b in range(1, len(drawing.nodes)):
            longest[b] = 1 + max(longest[a] for a, c in drawing.edges if c == b)
        assert [x for x, _ in places] == list(longest.values())
        assert layout(drawing) == places


def test_layout_puts_branches_beside_each_other():
    found = structure(Inception(), X)
    place = dict(zip((node.name for node in found.nodes), layout(found), strict=True))
    assert {place[name][0] for name in ("one", "three.0", "max_pool2d")} == {3}
    assert [place[name][1] for name in ("three.0", "one", "max_pool2d")] == [0, 1, 2]  # the longest way is lane 0
    assert place["cat"] == (6, 0)


def test_a_net_that_fails_is_left_alone():
    net = untidy(SmallCNN(**DATA))
    with unchanged(net), pytest.raises(ValueError, match="3 channel"):
        structure(net, X[:, :1])
