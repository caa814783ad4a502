"""A merge into a model of a trillion parameters: ``python -m benchmarks.huge``."""
