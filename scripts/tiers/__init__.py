"""Which rooms of regraft the fast tests call: ``PYTHONPATH=scripts python -m tiers``."""
