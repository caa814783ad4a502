"""What survives of a QLoRA adapter in 4 bits: ``python -m benchmarks.qlora``."""
