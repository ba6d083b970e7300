"""Executing a plan: stages with fingerprints, events, reuse and resume."""
