"""Other tools' benchmarks: their result files read as profile.v1, and the tools run by us."""
