"""New adapters, and what transformers' Trainer trains."""
