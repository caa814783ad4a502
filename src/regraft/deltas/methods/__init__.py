"""How several deltas become one: a pure function for each method, and a registry of them."""
