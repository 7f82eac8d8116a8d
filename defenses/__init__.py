"""Resist: threat models, attacks, robust losses, interpretation-guided regularisers, and the defense they make up."""

from glassarmor.defenses.attacks.apgd import APGD, APGDT
from glassarmor.defenses.attacks.free import Free
from glassarmor.defenses.attacks.minimum_norm import CarliniWagner, ElasticNet, GroupSparse
from glassarmor.defenses.attacks.objectives import (
    DLR,
    CrossEntropy,
    KLToClean,
    Margin,
    NuclearCE,
    Objective,
    Targeted,
    TargetedDLR,
    TargetedMargin,
)
from glassarmor.defenses.attacks.pgd import FGSM, FGSMRS, NFGSM, PGD, Attack
from glassarmor.defenses.attacks.square import Square
from glassarmor.defenses.attacks.supported import Supported
from glassarmor.defenses.evaluation.accuracy import accuracy_under
from glassarmor.defenses.evaluation.adaptive import AdaptivePGD
from glassarmor.defenses.evaluation.examples import FelledExamples, Replay
from glassarmor.defenses.evaluation.robustness import Evaluation, evaluate_robustness
from glassarmor.defenses.evaluation.sanity import Check, SanityReport, sanity_checks
from glassarmor.defenses.evaluation.suite import Suite, make_suite
from glassarmor.defenses.masking import UnitMask, choose_units, fine_tune, masked, unit_scores
from glassarmor.defenses.monitoring.alarms import Limits
from glassarmor.defenses.threat import L2, Linf, Threat
from glassarmor.defenses.training.auxiliary import AuxiliaryCE
from glassarmor.defenses.training.defense import Defense, StepOutput
from glassarmor.defenses.training.local import GradAlign, GradientNorm, LocalLinearity
from glassarmor.defenses.training.regularizers import PSE, CAMDiscrepancy, UnitKL, UnitSensitivity
from glassarmor.defenses.training.terms import (
    AdversarialCE,
    CleanCE,
    FeatureConsistency,
    LogitPairing,
    MartBCE,
    MartKL,
    NuclearNorm,
    Ramp,
    Term,
    TradesKL,
)
from glassarmor.defenses.training.weights import AWP

__all__ = [
    "APGD",
    "APGDT",
    "AWP",
    "DLR",
    "FGSM",
    "FGSMRS",
    "L2",
    "NFGSM",
    "PGD",
    "PSE",
    "AdaptivePGD",
    "AdversarialCE",
    "Attack",
    "AuxiliaryCE",
    "CAMDiscrepancy",
    "CarliniWagner",
    "Check",
    "CleanCE",
    "CrossEntropy",
    "Defense",
    "ElasticNet",
    "Evaluation",
    "FeatureConsistency",
    "FelledExamples",
    "Free",
    "GradAlign",
    "GradientNorm",
    "GroupSparse",
    "KLToClean",
    "Limits",
    "Linf",
    "LocalLinearity",
    "LogitPairing",
    "Margin",
    "MartBCE",
    "MartKL",
    "NuclearCE",
    "NuclearNorm",
    "Objective",
    "Ramp",
    "Replay",
    "SanityReport",
    "Square",
    "StepOutput",
    "Suite",
    "Supported",
    "Targeted",
    "TargetedDLR",
    "TargetedMargin",
    "Term",
    "Threat",
    "TradesKL",
    "UnitKL",
    "UnitMask",
    "UnitSensitivity",
    "accuracy_under",
    "choose_units",
    "evaluate_robustness",
    "fine_tune",
    "make_suite",
    "masked",
    "sanity_checks",
    "unit_scores",
]
