"""Finding a student's shape: enumerate, rank without training, halve, and say what was found."""
