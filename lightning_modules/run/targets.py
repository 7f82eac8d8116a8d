"""Saved configs of before: what their ``_target_`` entries and overrides are called now.

A config names public faces, ``glassarmor.defenses.PGD``, so that files may move.  Until version 0.2 it named files: run
folders, cards and studies of before are read by this table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

RENAMED: Final[Mapping[str, str]] = {
    "datamodules.arrays.Arrays": "glassarmor.datamodules.Arrays",
    "datamodules.augment.Augment": "glassarmor.datamodules.Augment",
    "datamodules.cifar.CIFAR10": "glassarmor.datamodules.CIFAR10",
    "datamodules.cifar.CIFAR100": "glassarmor.datamodules.CIFAR100",
    "datamodules.concepts.procedural_concepts": "glassarmor.datamodules.procedural_concepts",
    "datamodules.digits.Digits": "glassarmor.datamodules.Digits",
    "datamodules.image_folder.ImageFolder": "glassarmor.datamodules.ImageFolder",
    "datamodules.segmentation.SegmentationFolder": "glassarmor.datamodules.SegmentationFolder",
    "datamodules.shapes.Shapes": "glassarmor.datamodules.Shapes",
    "datamodules.svhn.SVHN": "glassarmor.datamodules.SVHN",
    "defenses.adaptive.AdaptivePGD": "glassarmor.defenses.AdaptivePGD",
    "defenses.alarms.Limits": "glassarmor.defenses.Limits",
    "defenses.apgd.APGD": "glassarmor.defenses.APGD",
    "defenses.apgd.APGDT": "glassarmor.defenses.APGDT",
    "defenses.attacks.Attack": "glassarmor.defenses.Attack",
    "defenses.attacks.FGSM": "glassarmor.defenses.FGSM",
    "defenses.attacks.FGSMRS": "glassarmor.defenses.FGSMRS",
    "defenses.attacks.NFGSM": "glassarmor.defenses.NFGSM",
    "defenses.attacks.PGD": "glassarmor.defenses.PGD",
    "defenses.auxiliary.AuxiliaryCE": "glassarmor.defenses.AuxiliaryCE",
    "defenses.defense.Defense": "glassarmor.defenses.Defense",
    "defenses.defense.StepOutput": "glassarmor.defenses.StepOutput",
    "defenses.fallen.Fallen": "glassarmor.defenses.FelledExamples",
    "defenses.fallen.Recalled": "glassarmor.defenses.Replay",
    "defenses.free.Free": "glassarmor.defenses.Free",
    "defenses.local.GradAlign": "glassarmor.defenses.GradAlign",
    "defenses.local.GradientNorm": "glassarmor.defenses.GradientNorm",
    "defenses.local.LocalLinearity": "glassarmor.defenses.LocalLinearity",
    "defenses.masking.UnitMask": "glassarmor.defenses.UnitMask",
    "defenses.minimum_norm.CarliniWagner": "glassarmor.defenses.CarliniWagner",
    "defenses.minimum_norm.ElasticNet": "glassarmor.defenses.ElasticNet",
    "defenses.minimum_norm.GroupSparse": "glassarmor.defenses.GroupSparse",
    "defenses.objectives.CrossEntropy": "glassarmor.defenses.CrossEntropy",
    "defenses.objectives.DLR": "glassarmor.defenses.DLR",
    "defenses.objectives.KLToClean": "glassarmor.defenses.KLToClean",
    "defenses.objectives.Margin": "glassarmor.defenses.Margin",
    "defenses.objectives.NuclearCE": "glassarmor.defenses.NuclearCE",
    "defenses.objectives.Objective": "glassarmor.defenses.Objective",
    "defenses.objectives.Targeted": "glassarmor.defenses.Targeted",
    "defenses.objectives.TargetedDLR": "glassarmor.defenses.TargetedDLR",
    "defenses.objectives.TargetedMargin": "glassarmor.defenses.TargetedMargin",
    "defenses.regularizers.CAMDiscrepancy": "glassarmor.defenses.CAMDiscrepancy",
    "defenses.regularizers.PSE": "glassarmor.defenses.PSE",
    "defenses.regularizers.UnitKL": "glassarmor.defenses.UnitKL",
    "defenses.regularizers.UnitSensitivity": "glassarmor.defenses.UnitSensitivity",
    "defenses.robustness.Evaluation": "glassarmor.defenses.Evaluation",
    "defenses.sanity.Check": "glassarmor.defenses.Check",
    "defenses.sanity.SanityReport": "glassarmor.defenses.SanityReport",
    "defenses.square.Square": "glassarmor.defenses.Square",
    "defenses.suite.Suite": "glassarmor.defenses.Suite",
    "defenses.supported.Supported": "glassarmor.defenses.Supported",
    "defenses.terms.AdversarialCE": "glassarmor.defenses.AdversarialCE",
    "defenses.terms.CleanCE": "glassarmor.defenses.CleanCE",
    "defenses.terms.FeatureConsistency": "glassarmor.defenses.FeatureConsistency",
    "defenses.terms.LogitPairing": "glassarmor.defenses.LogitPairing",
    "defenses.terms.MartBCE": "glassarmor.defenses.MartBCE",
    "defenses.terms.MartKL": "glassarmor.defenses.MartKL",
    "defenses.terms.NuclearNorm": "glassarmor.defenses.NuclearNorm",
    "defenses.terms.Ramp": "glassarmor.defenses.Ramp",
    "defenses.terms.Term": "glassarmor.defenses.Term",
    "defenses.terms.TradesKL": "glassarmor.defenses.TradesKL",
    "defenses.threat.L2": "glassarmor.defenses.L2",
    "defenses.threat.Linf": "glassarmor.defenses.Linf",
    "defenses.threat.Threat": "glassarmor.defenses.Threat",
    "defenses.weights.AWP": "glassarmor.defenses.AWP",
    "interpret.views.attribution.AttributionPanel": "glassarmor.interpret.views.AttributionPanel",
    "interpret.views.cam.CAMPanel": "glassarmor.interpret.views.CAMPanel",
    "interpret.views.dissection.DissectionPanel": "glassarmor.interpret.views.DissectionPanel",
    "interpret.views.failures.FailuresPanel": "glassarmor.interpret.views.FailuresPanel",
    "interpret.views.outcome.OutcomePanel": "glassarmor.interpret.views.OutcomePanel",
    "interpret.views.profiles.ProfilesPanel": "glassarmor.interpret.views.ProfilesPanel",
    "interpret.views.pse.PSEPanel": "glassarmor.interpret.views.PSEPanel",
    "interpret.views.restoration.RestorationPanel": "glassarmor.interpret.views.RestorationPanel",
    "interpret.views.sensitivity.SensitivityPanel": "glassarmor.interpret.views.SensitivityPanel",
    "interpret.views.training.TrainingPanel": "glassarmor.interpret.views.TrainingPanel",
    "interpret.views.units.UnitsPanel": "glassarmor.interpret.views.UnitsPanel",
    "lightning_modules.callbacks.health.Health": "glassarmor.lightning_modules.callbacks.Health",
    "lightning_modules.networks.imported.imported": "glassarmor.lightning_modules.networks.imported",
    "lightning_modules.networks.peers.CASGate": "glassarmor.lightning_modules.networks.CASGate",
    "lightning_modules.networks.peers.CIFSGate": "glassarmor.lightning_modules.networks.CIFSGate",
    "lightning_modules.networks.peers.FSRGate": "glassarmor.lightning_modules.networks.FSRGate",
    "lightning_modules.networks.peers.gated": "glassarmor.lightning_modules.networks.gated",
    "lightning_modules.networks.resnet.preact_resnet18": "glassarmor.lightning_modules.networks.preact_resnet18",
    "lightning_modules.networks.resnet.resnet18": "glassarmor.lightning_modules.networks.resnet18",
    "lightning_modules.networks.small_cnn.SmallCNN": "glassarmor.lightning_modules.networks.SmallCNN",
    "lightning_modules.networks.torchvision_net.torchvision_net": "glassarmor.lightning_modules.networks.torchvision_net",
    "lightning_modules.networks.wide_resnet.wide_resnet": "glassarmor.lightning_modules.networks.wide_resnet",
    "lightning_modules.schedules.cosine": "glassarmor.lightning_modules.cosine",
    "lightning_modules.schedules.piecewise": "glassarmor.lightning_modules.piecewise",
}
_NAMES: Final = re.compile(
    "|".join(rf"(?<![\\w.]){re.escape(name)}(?!\\w)" for name in sorted(RENAMED, key=len, reverse=True))
)


def canonical(value: Any) -> Any:
    """Plain values with every ``_target_`` by its public name, in overrides such as ``x={_target_:…}`` too.

    Example:
        >>> canonical({"_target_": "defenses.threat.Linf", "eps": 0.1})
        {'_target_': 'glassarmor.defenses.Linf', 'eps': 0.1}
        >>> canonical(["regularizers.pse.weight={_target_:defenses.terms.Ramp,start:0}"])
        ['regularizers.pse.weight={_target_:glassarmor.defenses.Ramp,start:0}']
    """
    if isinstance(value, Mapping):
        return {key: _public(inner) if key == "_target_" else canonical(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(inner) for inner in value]
    return _NAMES.sub(lambda name: RENAMED[name[0]], value) if isinstance(value, str) and "_target_" in value else value


def _public(target: Any) -> Any:
    return RENAMED.get(target, target) if isinstance(target, str) else canonical(target)
