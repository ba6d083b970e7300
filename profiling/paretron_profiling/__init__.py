"""Measure models on real serving engines, compare them, and report the trade-off."""
