"""Resist: threat models, attacks, robust losses, interpretation-guided regularisers, and the defense they make up."""

from defenses.attacks import FGSM, FGSMRS, NFGSM, PGD, Attack
from defenses.defense import Defense, StepOutput
from defenses.evaluation import accuracy_under
from defenses.objectives import CrossEntropy, KLToClean, Margin, Objective, Targeted
from defenses.regularizers import PSE, UnitSensitivity
from defenses.terms import AdversarialCE, CleanCE, LogitPairing, MartBCE, MartKL, Ramp, Term, TradesKL
from defenses.threat import L2, Linf, Threat

__all__ = [
    "FGSM",
    "FGSMRS",
    "L2",
    "NFGSM",
    "PGD",
    "PSE",
    "AdversarialCE",
    "Attack",
    "CleanCE",
    "CrossEntropy",
    "Defense",
    "KLToClean",
    "Linf",
    "LogitPairing",
    "Margin",
    "MartBCE",
    "MartKL",
    "Objective",
    "Ramp",
    "StepOutput",
    "Targeted",
    "Term",
    "Threat",
    "TradesKL",
    "UnitSensitivity",
    "accuracy_under",
]
