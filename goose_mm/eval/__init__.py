"""Metrics and benchmark runs; importing this package imports none of them."""
