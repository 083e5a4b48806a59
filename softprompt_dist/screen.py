"""Standard output and error that end no work: whatever their encoding, and whoever reads them.

A character that the encoding lacks is written as JSON escapes it. Once nobody reads any more
(`| head -1`, a log collector that died, a terminal that was closed), what a listing would print is
wanted no longer, and it ends. Work whose result is on the disk goes on: in silence, or, where the
disk of its log is full or away, without what was to be written meanwhile.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from dataclasses import dataclass

_ESCAPED = "softprompt.escaped"
_READER_GONE = {errno.EPIPE, errno.EIO, errno.ENXIO}
"""The other end of a pipe was closed, a terminal hung up."""


@dataclass
class _Screen:
    """What this process has found out about its readers."""

    outlives_readers: bool = False
    is_reader_lost: bool = False


_screen = _Screen()


def prepare() -> None:
    """Make standard output and error such. Again: nothing changes."""
    codecs.register_error(_ESCAPED, _escape)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed; what is opened next would take its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - stays open
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=_ESCAPED)
        # Another one than the process began with is somebody's who wants to read it.
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            lasting = _lasting(stream, must_be_read=name == "stdout")
            setattr(sys, name, lasting)
            setattr(sys, f"__{name}__", lasting)


def outlive_readers() -> None:
    """From now on this process works for a result on the disk, whether anybody reads or not."""
    _screen.outlives_readers = True


def is_reader_lost() -> bool:
    """Whether standard output was wanted no longer by whoever read it."""
    return _screen.is_reader_lost


class _Lasting(io.RawIOBase):
    """A file descriptor to write to, for which no error of its reader is one of the writer."""

    def __init__(self, descriptor: int, must_be_read: bool) -> None:
        self._descriptor, self._must_be_read = descriptor, must_be_read

    def write(self, content: bytes, /) -> int:  # type: ignore[override]
        try:
            return os.write(self._descriptor, content)
        except OSError as error:
            if error.errno in _READER_GONE:
                self._write_nowhere()
            if self._must_be_read and not _screen.outlives_readers:
                _screen.is_reader_lost = error.errno == errno.EPIPE
                raise
            return len(content)

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def _write_nowhere(self) -> None:
        """For libraries and children that write to this descriptor by themselves, too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._descriptor)
        os.close(nowhere)


def _lasting(stream: io.TextIOWrapper, *, must_be_read: bool) -> io.TextIOWrapper:
    if isinstance(getattr(stream.buffer, "raw", None), _Lasting):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(stream.fileno(), must_be_read)),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,  # python -u
    )


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    escaped = "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
    return escaped, error.end
