"""Supply: data sets as Lightning data modules, images in [0,1], and concepts for the dissection."""

from glassarmor.datamodules.arrays import Arrays
from glassarmor.datamodules.augment import Augment
from glassarmor.datamodules.cifar import CIFAR10, CIFAR100
from glassarmor.datamodules.concepts import procedural_concepts
from glassarmor.datamodules.digits import Digits
from glassarmor.datamodules.image_folder import ImageFolder
from glassarmor.datamodules.images import ImageDataModule
from glassarmor.datamodules.segmentation import SegmentationFolder
from glassarmor.datamodules.shapes import Shapes
from glassarmor.datamodules.svhn import SVHN

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "SVHN",
    "Arrays",
    "Augment",
    "Digits",
    "ImageDataModule",
    "ImageFolder",
    "SegmentationFolder",
    "Shapes",
    "procedural_concepts",
]
