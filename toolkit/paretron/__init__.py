"""Paretron: one recipe from a pretrained language model to smaller, measured, servable ones."""

__version__ = "0.1.0"
