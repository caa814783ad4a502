"""Merging on files: recipe, match, plan, execute, receipt."""
