"""Experiments on the backbone itself: what its recurrence can compute, by construction."""
