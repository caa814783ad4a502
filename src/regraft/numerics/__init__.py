"""The ground of all compiled loops: single operations, conversions, types of arrays."""
