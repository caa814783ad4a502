"""Measurements of regraft, a folder for each subject; run from the root of the repository."""
