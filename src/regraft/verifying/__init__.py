"""Comparing checkpoints: with their receipt, with a merge done again, with each other."""
