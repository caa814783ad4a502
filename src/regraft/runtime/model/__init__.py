"""A running model, seen as a checkpoint: its weights and wrappers, and whether they changed."""
