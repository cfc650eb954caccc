"""What can go wrong in a way that a user can mend.

Every message is one sentence that names the file or the field, what was found and what was expected. Command-line
programs print it and exit with a non-zero code; a traceback means a defect of kvcompress itself.
"""


class KVCompressError(Exception):
    """Base of all errors that a user can act on."""


class InputError(KVCompressError, ValueError):
    """A parameter, a file or a text is not what it has to be."""


class UnsupportedModelError(KVCompressError, ValueError):
    """This model's attention cannot be observed or compressed; the message says why."""


class CacheUseError(KVCompressError, RuntimeError):
    """A compressed cache was used in a way that would give wrong answers."""
