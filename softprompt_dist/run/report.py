"""Scores in words: an interval, and whether one score is above another beyond chance."""

from __future__ import annotations


def interval_text(interval: tuple[float, float]) -> str:
    """As `71.4 to 86.2`."""
    low, high = interval
    return f"{low:.1f} to {high:.1f}"


def verdict(
    judged: tuple[str, float], other: tuple[str, float], interval: tuple[float, float]
) -> str:
    """One sentence on two (name, score in percent), given the 95 % interval of their difference."""
    judged_text, other_text = (f"{name} ({score:.1f})" for name, score in (judged, other))
    difference = judged[1] - other[1]
    relation = "above" if difference > 0 else "BELOW" if difference < 0 else "equal to"
    start = f"The {judged_text} is {relation} {other_text}"
    if difference == 0:
        return f"{start}."
    low, high = interval
    if low <= 0 <= high:
        return f"{start} by {abs(difference):.1f} points, which may be chance at this n."
    smallest, largest = sorted((abs(low), abs(high)))
    return (
        f"{start} by {abs(difference):.1f} points (95 % interval {smallest:.1f} to {largest:.1f})."
    )
