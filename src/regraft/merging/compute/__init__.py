"""How one tile is computed, there and back."""
