"""A little text as tokens, and trainings of seconds."""

from picotraining import arguments, tokens

__all__ = ["arguments", "tokens"]
