"""Quantized weights: what the codes of a checkpoint stand for, and how to make them."""
