"""Delta maths: what an adapter adds to a weight, exactly as docs/arithmetic.md states it."""
