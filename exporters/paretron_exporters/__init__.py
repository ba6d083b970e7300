"""Exporters: a checkpoint in the form an engine loads, published only when proven equal to it."""
