"""Panels: a probe in, a view out."""
