"""One file per adapter dialect; each turns files into the one form of an adapter."""
