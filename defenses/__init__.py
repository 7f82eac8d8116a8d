"""Resist: threat models, attacks, robust losses, interpretation-guided regularisers, and the defense they make up."""

from defenses.adaptive import AdaptivePGD
from defenses.apgd import APGD, APGDT
from defenses.attacks import FGSM, FGSMRS, NFGSM, PGD, Attack
from defenses.defense import Defense, StepOutput
from defenses.evaluation import accuracy_under
from defenses.fallen import Fallen, Recalled
from defenses.free import Free
from defenses.local import GradAlign, GradientNorm, LocalLinearity
from defenses.masking import UnitMask, choose_units, fine_tune, masked, unit_scores
from defenses.minimum_norm import CarliniWagner, ElasticNet, GroupSparse
from defenses.objectives import (
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
from defenses.regularizers import PSE, CAMDiscrepancy, UnitKL, UnitSensitivity
from defenses.robustness import Evaluation, evaluate_robustness
from defenses.sanity import Check, SanityReport, sanity_checks
from defenses.square import Square
from defenses.suite import Suite, make_suite
from defenses.supported import Supported
from defenses.terms import (
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
from defenses.threat import L2, Linf, Threat
from defenses.weights import AWP

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
    "CAMDiscrepancy",
    "CarliniWagner",
    "Check",
    "CleanCE",
    "CrossEntropy",
    "Defense",
    "ElasticNet",
    "Evaluation",
    "Fallen",
    "FeatureConsistency",
    "Free",
    "GradAlign",
    "GradientNorm",
    "GroupSparse",
    "KLToClean",
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
    "Recalled",
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
