"""What differs between two models, two adapters or two merges."""
