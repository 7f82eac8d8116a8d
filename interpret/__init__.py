"""Understand: what an attack does inside a network, as pure functions of one observation."""

from interpret.cam import (
    CAMTable,
    Interpretability,
    cam_change,
    cam_table,
    class_activation_map,
    interpretability,
    interpretability_score,
)
from interpret.conductance import Conductance, conductance
from interpret.metrics import KindShares, RunningSensitivity
from interpret.observation import Forward, Observation, feature_layers, observe, record
from interpret.overlap import Overlap, region_overlap
from interpret.patching import unit_patching
from interpret.pse import PromotionSuppression, position_effects, region_effects, unit_effects
from interpret.restoration import RestorationCurve, restoration_curve
from interpret.sensitivity import (
    SensitivityControl,
    StrengthCurves,
    relative_unit_sensitivity,
    sensitivity_control,
    strength_curves,
    unit_sensitivity,
)

__all__ = [
    "CAMTable",
    "Conductance",
    "Forward",
    "Interpretability",
    "KindShares",
    "Observation",
    "Overlap",
    "PromotionSuppression",
    "RestorationCurve",
    "RunningSensitivity",
    "SensitivityControl",
    "StrengthCurves",
    "cam_change",
    "cam_table",
    "class_activation_map",
    "conductance",
    "feature_layers",
    "interpretability",
    "interpretability_score",
    "observe",
    "position_effects",
    "record",
    "region_effects",
    "region_overlap",
    "relative_unit_sensitivity",
    "restoration_curve",
    "sensitivity_control",
    "strength_curves",
    "unit_effects",
    "unit_patching",
    "unit_sensitivity",
]
