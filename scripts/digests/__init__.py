"""Digests of a fixed set of outputs: what regraft writes, on any processor and in any version.

``python -m digests`` makes small bases and adapters from fixed numbers, runs the verbs on them, and
prints a digest of each file that comes out. Only regraft's own dependencies are needed.
"""
