"""An arm64 Python on another processor: Debian's packages and PyPI's wheels, run by qemu."""
