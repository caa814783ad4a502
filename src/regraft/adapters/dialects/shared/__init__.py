"""What several dialects share: the base, experts, ties, rows, files of PyTorch and of PEFT."""
