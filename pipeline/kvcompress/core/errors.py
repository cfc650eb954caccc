"""What can go wrong in a way that a user can mend.

Every message is one sentence that names the file or the field, what was found and what was expected. Command-line
programs print it and exit with a non-zero code; a traceback means a defect of kvcompress itself.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class KVCompressError(Exception):
    """Base of all errors that a user can act on."""


class InputError(KVCompressError, ValueError):
    """A parameter, a file or a text is not what it has to be."""


class UnsupportedModelError(KVCompressError, ValueError):
    """This model's attention cannot be observed or compressed; the message says why."""


class CacheUseError(KVCompressError, RuntimeError):
    """A compressed cache was used in a way that would give wrong answers."""


@contextmanager
def said_in_a_sentence() -> Iterator[None]:
    """For programs: print an error that a user can mend on standard error, and end with code 1."""
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
