"""An adapter in memory becomes a folder in PEFT's format."""
