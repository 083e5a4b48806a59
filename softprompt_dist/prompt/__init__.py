"""The soft prompt: the only state of a run. Module, initialisation and file."""
