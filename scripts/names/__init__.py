"""The table of names that transformers uses: ``PYTHONPATH=scripts python -m names.generate``."""
