"""Start closer to the teacher: rotate the residual stream before cutting it, refit what is cut."""
