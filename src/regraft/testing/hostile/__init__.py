"""Hostile files and folders, made at random from a seed, and what regraft says of each."""
