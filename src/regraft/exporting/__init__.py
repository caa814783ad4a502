"""Models in the forms that other programs serve: GGUF, Ollama's folder, MLX's config."""
