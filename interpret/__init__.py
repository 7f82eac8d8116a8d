"""Understand: what an attack does inside a network, as pure functions of one observation."""

from interpret.cam import cam_change, class_activation_map
from interpret.metrics import KindShares, RunningSensitivity
from interpret.observation import Forward, Observation, feature_layers, observe, record
from interpret.pse import PromotionSuppression, position_effects, region_effects, unit_effects
from interpret.sensitivity import relative_unit_sensitivity, unit_sensitivity

__all__ = [
    "Forward",
    "KindShares",
    "Observation",
    "PromotionSuppression",
    "RunningSensitivity",
    "cam_change",
    "class_activation_map",
    "feature_layers",
    "observe",
    "position_effects",
    "record",
    "region_effects",
    "relative_unit_sensitivity",
    "unit_effects",
    "unit_sensitivity",
]
