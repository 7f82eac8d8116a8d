"""Wire: the Lightning module, its schedules, and what commands, studies and cards are made of."""

from glassarmor.lightning_modules.classifier import RobustClassifier
from glassarmor.lightning_modules.run.log import open_log
from glassarmor.lightning_modules.schedules import cosine, piecewise

__all__ = ["RobustClassifier", "cosine", "open_log", "piecewise"]
