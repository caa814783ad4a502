"""What systems have in different ways: each subject in a file, with a portable way beside it.

The way is chosen by what is there (a function, a flag, a call that does not fail), and not by the
name of the system. Nothing here raises errors of regraft's: callers know what to say.
"""
