"""Prompts asked of a merge and of the base with its adapters, and how far answers differ."""
