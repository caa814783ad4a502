"""The merge in a model's own memory, and its way back."""
