"""Callbacks: the dashboard, the health monitor, checkpoints, and the end of a run that is asked to stop."""

from glassarmor.lightning_modules.callbacks.dashboard import Dashboard
from glassarmor.lightning_modules.callbacks.health import Health

__all__ = ["Dashboard", "Health"]
