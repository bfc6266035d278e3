"""Errors of a command: one line that says what is wrong and what to do, and exit code 2 or 3."""

import difflib
import errno
import functools
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable


class InputError(Exception):
    """Invalid input from the user. The message is one line: what is wrong, and what to do."""

    exit_code = 2


class SaveError(InputError):
    """A failed save of a checkpoint, whose threads may not have ended. The message is one line."""


class PeerError(InputError):
    """Failure or loss of another process of the run. The message is one line: which, and why."""

    exit_code = 3


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap the `main` of a command: an `InputError` is printed as `error: ...`, with its exit code.

    So is an error of a file or directory (not there, not writable, not a directory, a full disk):
    the user has to act, and a traceback would not say so. Text is UTF-8 in every locale.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        use_utf8()
        try:
            main(*args, **kwargs)
        except (PeerError, SaveError) as error:
            code = _fail(str(error), error.exit_code)
            # A normal exit would join the threads that wait for the lost process, and hang; and
            # the unfinished writes of a failed save would add their own lines to the error.
            for child in multiprocessing.active_children():
                child.kill()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        except InputError as error:
            sys.exit(_fail(str(error), error.exit_code))
        except KeyboardInterrupt:
            # Ctrl-C: what was being written is gone. By convention 128 and the signal's number.
            sys.exit(_fail("interrupted", 128 + signal.SIGINT))
        except BrokenPipeError:
            # The reader has closed the output, as `head` does; Python would report it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            # Other errors without a file are of the network, or of this program.
            if error.errno not in (*_DISK_ERRORS, *_DEVICE_ERRORS) and error.filename is None:
                raise
            sys.exit(_fail(os_error_text(error)))

    return wrapped


def use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if the locale has another encoding.

    Arguments, names of files and printed texts may be in Hindi. Characters that the output still
    cannot have (PYTHONIOENCODING, bytes in the name of a file) are escaped.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def os_error_text(error: OSError) -> str:
    """Return the reason and the file of an `OSError`, in one line."""
    text = f"{error.strerror or error}: {error.filename or 'while reading or writing'}"
    return f"{text}; free some space" if error.errno in _DISK_ERRORS else text


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEVICE_ERRORS = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV)


def _fail(message: str, exit_code: int = 2) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return exit_code


def require(holds: bool, otherwise: str) -> None:
    """Raise `InputError(otherwise)` unless `holds`."""
    if not holds:
        raise InputError(otherwise)


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """Return `; did you mean KEY?` with the most similar known key, or an empty text."""
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    return f"; did you mean {near[0]}?" if near else ""
