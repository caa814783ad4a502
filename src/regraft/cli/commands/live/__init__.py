"""The commands that answer with a live model."""
