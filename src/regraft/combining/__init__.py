"""The verb that makes one adapter of several."""
