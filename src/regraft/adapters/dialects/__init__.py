"""One file per adapter dialect; each turns files into an :class:`~regraft.adapters.model.Adapter`."""
