"""Serving engines, one file each, found through the entry-point group `paretron.engines`."""
