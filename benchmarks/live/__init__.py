"""Adapters on a running model against PEFT: ``python -m benchmarks.live``."""
