"""The plan of a merge: which stored tensor gets which delta, where, and what comes out."""
