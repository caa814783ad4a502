"""Lists of real use, each held against PEFT: ``PYTHONPATH=scripts python -m practice``."""
