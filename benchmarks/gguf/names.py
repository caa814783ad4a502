"""Words that all parts of the benchmark share; nothing is imported for them."""

TYPES = ("Q4_0", "Q4_K_M")
THREADS = "2"
"""How many threads llama.cpp's programs are given."""

SMALL = "SmolLM2-135M"
LARGE = "0.9 billion random weights"
