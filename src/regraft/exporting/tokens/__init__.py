"""Tokenizers as llama.cpp has them: what GGUF says of each kind that can be shown right."""
