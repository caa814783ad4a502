"""Opening and reading files that nobody vouches for: bounded, inside a folder, watched."""
