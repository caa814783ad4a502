"""Combining and extracting adapters, against PEFT and mergekit."""
