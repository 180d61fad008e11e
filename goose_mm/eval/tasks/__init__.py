"""Benchmarks as their pages hand them out: which files, which questions, how they are scored."""
