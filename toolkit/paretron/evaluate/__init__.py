"""How good a model is on held-out text, and whether two models are the same."""
