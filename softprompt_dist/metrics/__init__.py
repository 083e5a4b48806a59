"""Scores of answers, with their uncertainty."""
