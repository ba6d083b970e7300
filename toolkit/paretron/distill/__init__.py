"""Training a student: losses, the fused linear loss, the loop, parallelism, resumable state."""
