"""Numbers on the command line, refused where they are none."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_number(
    parser: argparse._ActionsContainer,
    name: str,
    kind: Callable[[str], float],
    purpose: str,
    default: float | None = None,
) -> None:
    """Add `--name N`."""
    parser.add_argument(f"--{name}", metavar="N", type=kind, default=default, help=purpose)


def amount(text: str) -> float:
    """A number above 0.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def rate(text: str) -> float:
    """A probability, 0 for never.

    Raises:
        ArgumentTypeError: it is below 0, or not below 1.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 0 and below 1")
    return value


def share(text: str) -> float:
    """A part of a whole.

    Raises:
        ArgumentTypeError: it is not above 0 and at most 1.
    """
    value = amount(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and at most 1")
    return value
