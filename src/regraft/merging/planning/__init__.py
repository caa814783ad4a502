"""What is to be done: which stored tensor gets which delta, where, and what comes out."""
