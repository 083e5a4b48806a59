"""The life of a run: who owns its directory, whether it is alive and well, how it ends."""
