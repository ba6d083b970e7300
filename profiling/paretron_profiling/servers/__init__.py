"""Servers that are started, watched and ended here, and the client that puts them under load."""
