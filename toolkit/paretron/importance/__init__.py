"""What matters: activation statistics of every width axis, influence and effect of every layer."""
