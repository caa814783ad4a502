"""Adapters in memory: read, matched, kept under a cap, lent out."""
