"""Common corruptions, five severities each, made from the images themselves: accuracy where nobody attacks.

The kinds follow Hendrycks & Dietterich 2019 (1903.12261); the strengths are ours, so the numbers are no CIFAR-10-C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from glassarmor.interpret.inputs import answer, checked
from glassarmor.interpret.modes import undisturbed

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]  # images in [0,1], severity 0..4, generator → images


def gaussian_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Standard deviation 0.04 to 0.2."""
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return (x + (0.04, 0.08, 0.12, 0.16, 0.2)[severity] * noise).clamp(0, 1)


def uniform_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Each pixel by at most 0.05 to 0.3."""
    noise = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
    return (x + (0.05, 0.1, 0.15, 0.2, 0.3)[severity] * noise).clamp(0, 1)


def blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian of standard deviation 0.4 to 1.6 pixels at 32×32, in proportion at other sizes; the border is repeated."""
    sigma = (0.4, 0.6, 0.8, 1.2, 1.6)[severity] * min(x.shape[-2:]) / 32
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel[..., None, :], groups=x.shape[1])
    return F.conv2d(rows, kernel[..., None], groups=x.shape[1]).clamp(0, 1)


def contrast(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Towards the image's own mean: 0.75 to 0.2 of the contrast stays."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (0.75, 0.6, 0.45, 0.3, 0.2)[severity] * (x - mean)


def brightness(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Lighter by 0.05 to 0.3."""
    return (x + (0.05, 0.1, 0.15, 0.2, 0.3)[severity]).clamp(0, 1)


def pixelate(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Averaged to 0.7 to 0.3 of the resolution, and back by the nearest pixel."""
    height, width = x.shape[-2:]
    share = (0.7, 0.6, 0.5, 0.4, 0.3)[severity]
    small = F.adaptive_avg_pool2d(x, (max(1, round(share * height)), max(1, round(share * width))))
    return F.interpolate(small, (height, width), mode="nearest-exact")


def jpeg(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Quality 80 to 15 of the JPEG codec; grey or RGB."""
    mode = ImageReadMode.GRAY if x.shape[1] == 1 else ImageReadMode.RGB
    pixels = (255 * x).round().to("cpu", torch.uint8)
    coded = encode_jpeg(list(pixels), quality=(80, 60, 40, 25, 15)[severity])
    return torch.stack(decode_jpeg(coded, mode=mode)).to(x.device, x.dtype) / 255


CORRUPTIONS: Final[dict[str, Corruption]] = {
    "gaussian noise": gaussian_noise,
    "uniform noise": uniform_noise,
    "blur": blur,
    "contrast": contrast,
    "brightness": brightness,
    "pixelate": pixelate,
    "JPEG": jpeg,
}


def corrupted_accuracy(
    net: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256, seed: int = 0
) -> dict[str, tuple[float, ...]]:
    """By corruption: accuracy in [0,1] at each of the five severities, in eval mode; the net is left as it was.

    Args:
        images: (N, C, H, W) in [0,1], C = 1 or 3; labels: (N,).
        seed: of the noise, the same for every net.

    Raises:
        ValueError: no image, or another number of channels.
    """
    images, labels, classes = checked(net, images, labels)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected at least one, grey or RGB; found shape {tuple(images.shape)}")
    device = next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    right = {name: [0] * 5 for name in CORRUPTIONS}
    with undisturbed(net), torch.no_grad():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x, y = x.to(device), y.to(device)
            for name, corrupt in CORRUPTIONS.items():
                for severity in range(5):
                    found = answer(net, corrupt(x, severity, generator), classes)
                    right[name][severity] += int((found.argmax(1) == y).sum())
    return {name: tuple(count / len(images) for count in counts) for name, counts in right.items()}
