"""Processes killed, and calls that fail: ``PYTHONPATH=scripts python -m torture.kills``."""
