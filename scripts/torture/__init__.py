"""Kills, hostile and changing inputs, flipped bits, interrupts: what ``make torture`` runs.

The commands in here are run with ``PYTHONPATH=scripts``."""
