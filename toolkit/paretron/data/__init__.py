"""Text to training batches: sources, the tokenizer, token stores on disk, the order of the data."""
