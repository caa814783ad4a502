"""One file per command: its options, and the call of the Python function it stands for."""
