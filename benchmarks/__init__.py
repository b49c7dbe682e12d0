"""Measurements: which optimizer reaches a loss first, and what a step costs."""
