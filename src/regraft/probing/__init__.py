"""Asking a running server whether its adapter acts."""
