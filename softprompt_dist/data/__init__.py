"""Text to token batches: sources, tasks, LM objectives, resumable order."""
