"""Understand: what an attack does inside a network, as pure functions of one observation."""

from glassarmor.interpret.modes import reading
from glassarmor.interpret.network.layouts import Layout, declare_layouts, layouts_of
from glassarmor.interpret.observation import Forward, Observation, feature_layers, observe, record
from glassarmor.interpret.signals.cam import (
    CAMTable,
    Interpretability,
    cam_change,
    cam_table,
    class_activation_map,
    interpretability,
    interpretability_score,
)
from glassarmor.interpret.signals.conductance import Conductance, conductance
from glassarmor.interpret.signals.overlap import Overlap, region_overlap
from glassarmor.interpret.signals.patching import unit_patching
from glassarmor.interpret.signals.pse import PromotionSuppression, position_effects, region_effects, unit_effects
from glassarmor.interpret.signals.restoration import RestorationCurve, restoration_curve
from glassarmor.interpret.signals.running import KindShares, RunningSensitivity
from glassarmor.interpret.signals.sensitivity import (
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
    "Layout",
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
    "declare_layouts",
    "feature_layers",
    "interpretability",
    "interpretability_score",
    "layouts_of",
    "observe",
    "position_effects",
    "reading",
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
