"""Dialects of adapters for image models, which are parts of a pipeline of diffusers."""
