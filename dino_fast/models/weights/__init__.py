"""Weights: reading checkpoints, other libraries' names for them, downloading and exporting."""
