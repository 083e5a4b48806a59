"""Prompt tuning of very large frozen language models, on one machine or a cluster."""

__version__ = "0.2.0.dev0"
