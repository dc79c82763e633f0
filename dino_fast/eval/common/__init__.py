"""Shared by the evaluations: the frozen network, its features, labels, images, crops and frames."""
