"""Signals: what an attack does to regions, units and maps."""
