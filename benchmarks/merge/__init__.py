"""A merge against a copy and against PEFT: ``python -m benchmarks.merge``."""
