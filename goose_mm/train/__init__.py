"""Training: one loop for every modality."""
