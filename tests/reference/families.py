"""Tiny networks of the families people use, with what the axes of their layers are, written down by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import timm
import torch
import torchvision.models as models
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2


@dataclass(frozen=True)
class Family:
    """``layers``: name → a letter for each axis of its output; ``prefix``: tokens that stand for no place, by layer;
    ``default``: what is observed where nobody names layers; ``calls``: how often a layer runs in a forward, if not once.
    """

    make: Callable[[], nn.Module]
    layers: dict[str, str]
    default: tuple[str, ...]
    shape: tuple[int, int, int] = (3, 32, 32)
    prefix: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


class Rows(nn.Module):
    """A transformer over the rows of an image."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(16, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x[:, 0])
        if not self.batch_first:
            rows = rows.transpose(0, 1)
        return self.head(self.encoder(rows).mean(1 if self.batch_first else 0))


class Recurrent(nn.Module):
    """Rows of an image as time steps."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.rnn = kind(16, 12, batch_first=batch_first)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0] if self.batch_first else x[:, 0].permute(1, 0, 2)
        out, _ = self.rnn(rows)
        return self.head(out[:, -1] if self.batch_first else out[-1])


class OwnCell(nn.Module):
    """A recurrent cell of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(16, 12), nn.Linear(12, 12)

    def forward(self, row: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self.enter(row) + self.again(state))


class Cells(nn.Module):
    """A cell called once a row."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 12)
        for row in x[:, 0].unbind(1):
            state = self.cell(row, state)
        return self.head(state)


class Mixing(nn.Module):
    """One block of an MLP-Mixer: linear layers work on tokens and on channels in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.tokens = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16))
        self.channels = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.blocks = nn.Sequential(Mixing(), Mixing())
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class Registers(nn.Module):
    """A transformer with a class token and two registers, patches cut by a reshape, attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 64, 12)
        self.first = nn.Parameter(torch.randn(1, 3, 12))
        self.place = nn.Parameter(torch.randn(1, 19, 12))
        self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.drop = nn.Identity()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        patches = x.reshape(n, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(n, 16, -1)
        tokens = torch.cat([self.first.expand(n, -1, -1), self.embed(patches)], 1) + self.place
        q, k, v = self.qkv(self.norm(tokens)).reshape(n, 19, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.drop((q @ k.transpose(-2, -1) / 6**0.5).softmax(-1))
        tokens = tokens + self.out((weights @ v).transpose(1, 2).reshape(n, 19, 12))
        return self.head(tokens[:, 0])


def of_timm(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=5, **options)


def vit() -> nn.Module:
    net = models.VisionTransformer(32, 8, 3, 2, 12, 16, num_classes=5)
    nn.init.normal_(net.heads.head.weight)  # zero as built
    return net


def convolutions(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        wrap(nn.Conv2d(3, 8, 3, 2, 1)), nn.ReLU(), wrap(nn.Conv2d(8, 12, 3, 2, 1)), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)
    )


def dense() -> nn.Module:
    return models.DenseNet(8, (2, 2), 16, num_classes=5)


def googlenet() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.GoogLeNet(num_classes=5, aux_logits=True, init_weights=False)


TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2}
SWIN = {"features.0": "NHWC", "features.1.0": "NHWC", "features.1.0.mlp.0": "NHWC", "features.3": "NHWC", "norm": "NHWC"}
ROWS = {"embed": "NTC", "encoder.layers.0": "NTC", "encoder.layers.1.linear1": "NTC", "encoder": "NTC", "head": "NC"}
FAMILIES: dict[str, Family] = {
    "ViT (torchvision)": Family(
        vit,
        {"conv_proj": "NCHW", "encoder.layers.encoder_layer_0": "NTC", "encoder.layers.encoder_layer_1.mlp.0": "NTC",
         "encoder.layers.encoder_layer_2": "NTC", "heads": "NC"},
        ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"),
        prefix={"encoder.layers.encoder_layer_0": 1, "encoder.layers.encoder_layer_1.mlp.0": 1,
                "encoder.layers.encoder_layer_2": 1},
    ),
    "ViT with registers, own attention": Family(
        Registers,
        {"embed": "NTC", "norm": "NTC", "qkv": "NTC", "out": "NTC", "drop": "NCTT"},
        ("out",),
        prefix={"norm": 3, "qkv": 3, "out": 3},
    ),
    "Swin": Family(
        lambda: models.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=5), SWIN, ("features.1", "permute")
    ),
    "Swin v2": Family(
        lambda: models.SwinTransformer(
            [4, 4], 12, [2, 1], [2, 2], [4, 4], num_classes=5, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
        ),
        SWIN,
        ("features.1", "permute"),
    ),
    "ConvNeXt": Family(
        lambda: ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=5, layer_scale=1.0),
        {"features.1.0.block.0": "NCHW", "features.1.0.block.2": "NHWC", "features.1.0.block.3": "NHWC", "features": "NCHW"},
        ("features.2.0", "features"),
    ),
    "MaxViT": Family(
        lambda: models.MaxVit((32, 32), 8, 2, [8, 12], [1, 1], 4, 0.0, num_classes=5),
        {"stem": "NCHW", "blocks.0.layers.0.layers.window_attention.mlp_layer": "NTTC", "blocks.0": "NCHW",
         "blocks.1": "NCHW"},
        ("blocks.0.layers.0.layers.MBconv.layers.conv_a", "blocks.1.layers.0.layers.MBconv.layers.conv_a", "blocks.1"),
    ),
    "DenseNet": Family(
        dense,
        {"features.conv0": "NCHW", "features.denseblock1": "NCHW", "features.norm5": "NCHW", "features": "NCHW"},
        ("features.relu0", "features.transition1.conv", "features"),
    ),
    "MobileNet v3": Family(
        lambda: models.mobilenet_v3_small(num_classes=5), {"features.1": "NCHW", "features.12": "NCHW"}, (), (3, 64, 64)
    ),
    "EfficientNet": Family(
        lambda: models.efficientnet_b0(num_classes=5), {"features.1": "NCHW", "features.8": "NCHW"}, (), (3, 64, 64)
    ),
    "GoogLeNet with auxiliary heads": Family(
        googlenet, {"conv1": "NCHW", "inception3b": "NCHW", "inception5b": "NCHW"}, (), (3, 64, 64)
    ),
    "ViT (timm), mean of tokens, registers": Family(
        lambda: of_timm("vit_small_patch16_224", **TIMM, global_pool="avg", class_token=False, reg_tokens=2),
        {"patch_embed": "NTC", "blocks.0": "NTC", "blocks.1.attn.q_norm": "NCTC", "blocks.2.mlp.fc1": "NTC"},
        ("blocks.0", "blocks.1"),
        prefix={"blocks.0": 2, "blocks.1.attn.q_norm": 2, "blocks.2.mlp.fc1": 2},
    ),
    "DeiT, distilled (timm)": Family(
        lambda: of_timm("deit_tiny_distilled_patch16_224", **TIMM),
        {"patch_embed": "NTC", "blocks.0": "NTC", "blocks.1.attn": "NTC"},
        ("blocks.0", "blocks.1"),
        prefix={"blocks.0": 2, "blocks.1.attn": 2},
    ),
    "hybrid of ResNet and ViT (timm)": Family(
        lambda: of_timm("vit_tiny_r_s16_p8_224", img_size=64, embed_dim=12, depth=2, num_heads=2),
        {"patch_embed.backbone": "NCHW", "patch_embed": "NTC", "blocks.0": "NTC"},
        ("patch_embed.backbone.norm", "patch_embed.backbone", "blocks.0"),
        (3, 64, 64),
        prefix={"blocks.0": 1},
    ),
    "Swin (timm)": Family(
        lambda: of_timm(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 2)
        ),
        {"layers.0": "NHWC", "layers.0.blocks.1.mlp.fc1": "NTC", "layers.1": "NHWC"},
        ("layers.0", "norm"),
    ),
    "MLP-Mixer (timm)": Family(
        lambda: timm.models.MlpMixer(img_size=32, patch_size=8, embed_dim=12, num_blocks=2, num_classes=5),
        {"stem": "NTC", "blocks.0": "NTC", "blocks.1.mlp_channels.fc1": "NTC"},
        ("blocks.0", "blocks.1"),
    ),
    "ConvNeXt (timm)": Family(
        lambda: of_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 12, 12)),
        {"stages.0": "NCHW", "stages.1.blocks.0.mlp.fc1": "NCHW", "stages.2": "NCHW"},
        (),
        (3, 64, 64),
    ),
    "flatten and linear head": Family(flattened, {"1": "NCHW", "3": "NCHW", "5": "NC"}, ("1", "3")),
    "weight norm": Family(lambda: convolutions(weight_norm), {"0": "NCHW", "3": "NCHW"}, ("1", "3")),
    "spectral norm": Family(lambda: convolutions(spectral_norm), {"0": "NCHW", "3": "NCHW"}, ("1", "3")),
    "MLP-Mixer": Family(
        Mixer,
        {"patches": "NCHW", "blocks.0": "NTC", "blocks.0.tokens": "NCT", "blocks.1.channels.0": "NTC", "norm": "NTC"},
        ("blocks.0", "blocks.1"),
    ),
    "row transformer": Family(lambda: Rows(True), ROWS, ("encoder.layers.0", "encoder.layers.1"), (1, 16, 16)),
    "row transformer, sequence first": Family(
        lambda: Rows(False),
        {name: "TNC" if name.startswith("encoder") else axes for name, axes in ROWS.items()},
        ("encoder.layers.0", "encoder.layers.1"),
        (1, 16, 16),
    ),
    "LSTM": Family(lambda: Recurrent(nn.LSTM, True), {"rnn": "NTC", "head": "NC"}, ("rnn",), (1, 16, 16)),
    "GRU, sequence first": Family(lambda: Recurrent(nn.GRU, False), {"rnn": "TNC", "head": "NC"}, ("rnn",), (1, 16, 16)),
    "GRU cell in a loop": Family(
        lambda: Cells(nn.GRUCell(16, 12)), {"cell": "NC", "head": "NC"}, ("cell",), (1, 16, 16), calls={"cell": 16}
    ),
    "own cell in a loop": Family(
        lambda: Cells(OwnCell()), {"cell": "NC", "head": "NC"}, ("cell",), (1, 16, 16), calls={"cell": 16}
    ),
    "fully connected": Family(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 5)),
        {"1": "NC", "4": "NC"},
        ("2", "4"),
        (1, 16, 16),
    ),
}  # fmt: skip


def images(family: Family, n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, nearby ones, labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *family.shape, generator=generator)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return x, x_adv, torch.arange(n) % 5


def canonical(output: Tensor, axes: str) -> Tensor:
    """(N, C, positions…) of an output whose axes are known; two axes of units become one."""
    units = [i for i, axis in enumerate(axes) if axis == "C"]
    order = [axes.index("N"), *units, *(i for i, axis in enumerate(axes) if axis not in "NC")]
    return output.permute(order).flatten(1, len(units))
