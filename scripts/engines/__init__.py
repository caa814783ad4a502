"""Runs each engine on small models: what it leaves out, and what `regraft check --for` says."""
