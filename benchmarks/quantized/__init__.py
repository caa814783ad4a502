"""Work on 4-bit models against its peers: ``python -m benchmarks.quantized``."""
