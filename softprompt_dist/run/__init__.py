"""Pieces of a run: loss, optimizer, loop, checkpoint, journal, report."""
