"""Errors that a user can mend.

Every message is one sentence that names the file, flag or field, what was found and what was expected. Command-line
programs print it and exit with code 1; a traceback means a defect of kvcompress itself.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class KVCompressError(Exception):
    """Base of all errors that a user can mend."""


class InputError(KVCompressError, ValueError):
    """Raised for a parameter, file or text that is not as expected."""


class UnsupportedModelError(KVCompressError, ValueError):
    """Raised for a model whose attention cannot be observed or compressed; the message gives the reason."""


class CacheUseError(KVCompressError, RuntimeError):
    """Raised for a use of a compressed cache that would give wrong answers."""


@contextmanager
def said_in_a_sentence() -> Iterator[None]:
    """Print an error that a user can mend on standard error and exit with code 1. For command-line programs."""
    try:
        yield
    except KVCompressError as error:
        message = str(error)
    except OSError as error:  # a full disk or a lost folder, wherever it shows
        message = f"{error.filename or 'a file'}: {error.strerror}" if error.strerror else str(error)
    else:
        return
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(1)


def one_line(error: Exception) -> str:
    """Return the message of an error of another library on one line, cut to 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
