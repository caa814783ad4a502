"""Adapters of any dialect, brought into one form."""
