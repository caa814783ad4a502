"""The commands that have to do with programs that serve models."""
