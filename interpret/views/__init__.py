"""Views: what the signals say, as charts that the page and W&B draw alike."""

from glassarmor.interpret.views.charts import Bars, Intervals, Lines, MapColumn, Maps, Profiles, Scatter, Table, Trend
from glassarmor.interpret.views.page.page import ReportPage
from glassarmor.interpret.views.panels.attribution import AttributionPanel
from glassarmor.interpret.views.panels.cam import CAMPanel
from glassarmor.interpret.views.panels.dissection import DissectionPanel
from glassarmor.interpret.views.panels.failures import FailuresPanel
from glassarmor.interpret.views.panels.outcome import OutcomePanel
from glassarmor.interpret.views.panels.profiles import ProfilesPanel
from glassarmor.interpret.views.panels.pse import PSEPanel
from glassarmor.interpret.views.panels.restoration import RestorationPanel
from glassarmor.interpret.views.panels.sensitivity import SensitivityPanel
from glassarmor.interpret.views.panels.training import TrainingPanel
from glassarmor.interpret.views.panels.units import UnitsPanel
from glassarmor.interpret.views.view import Answer, Probe, View

__all__ = [
    "Answer",
    "AttributionPanel",
    "Bars",
    "CAMPanel",
    "DissectionPanel",
    "FailuresPanel",
    "Intervals",
    "Lines",
    "MapColumn",
    "Maps",
    "OutcomePanel",
    "PSEPanel",
    "Probe",
    "Profiles",
    "ProfilesPanel",
    "ReportPage",
    "RestorationPanel",
    "Scatter",
    "SensitivityPanel",
    "Table",
    "TrainingPanel",
    "Trend",
    "UnitsPanel",
    "View",
]
