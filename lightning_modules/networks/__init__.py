"""Networks: factories that a config names, each for the classes, channels and statistics of the data."""

from glassarmor.lightning_modules.networks.imported import imported
from glassarmor.lightning_modules.networks.peers import CASGate, CIFSGate, FSRGate, gated
from glassarmor.lightning_modules.networks.resnet import preact_resnet18, resnet18
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from glassarmor.lightning_modules.networks.small_vit import small_vit
from glassarmor.lightning_modules.networks.timm_net import timm_net
from glassarmor.lightning_modules.networks.torchvision_net import torchvision_net
from glassarmor.lightning_modules.networks.wide_resnet import wide_resnet

__all__ = [
    "CASGate",
    "CIFSGate",
    "FSRGate",
    "SmallCNN",
    "gated",
    "imported",
    "preact_resnet18",
    "resnet18",
    "small_vit",
    "timm_net",
    "torchvision_net",
    "wide_resnet",
]
