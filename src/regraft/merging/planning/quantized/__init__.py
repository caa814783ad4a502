"""What of a plan is about quantized outputs: which weights, kept or made, in GGUF or not."""
