"""Base class of the kit's exceptions."""

from __future__ import annotations


class PixArtNBError(ValueError):
    """Base class of all exceptions that the kit raises on purpose.

    The message says what was given, what was expected and what to do. The command line prints it as one line; any
    other exception is a bug and shows its traceback.
    """


class WriteError(PixArtNBError, OSError):
    """An output that cannot be written: no space, no permission, a file in place of a folder."""


class FolderInUseError(PixArtNBError):
    """A folder that another process is writing into."""
