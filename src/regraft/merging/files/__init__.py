"""What is written: weights past the page cache, side files, card, receipt; whole or not at all."""
