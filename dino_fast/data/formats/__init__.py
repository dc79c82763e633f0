"""Readers of the layouts in which people keep images: one file a format."""
