"""What survives of an adapter in a GGUF file that keeps its types: see ``__main__``."""
