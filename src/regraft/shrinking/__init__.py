"""Making an adapter smaller: fewer bits, a lower rank, no copies of what the base has."""
