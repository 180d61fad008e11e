"""Benchmark runs and reports; importing this package imports none of them."""
