"""Ranks and launchers: joining the world, agreeing on errors, equality of the prompt."""
