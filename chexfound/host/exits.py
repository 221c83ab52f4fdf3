"""How a command ends: by its exit code, with an error as a sentence and no traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable

from chexfound.errors import ChexfoundError, StorageError
from chexfound.parsing.names import shown

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def ended(run: Callable[[], int], stopped: str = "Stopped; nothing was left half-written.", who: str = "") -> int:
    """Run a command and return its exit code; an error of ours, or Ctrl-C, is said on standard error.

    Output that its reader closed (`| head`) ends the command quietly, with a shell's 141; a full device is told, with
    8.  Notes of an error (`add_note`) are said after it.

    Args:
        run: the command; it returns its exit code, or raises.
        stopped: what is said after Ctrl-C; nothing if empty.
        who: stands before an error, of a process that is one of several.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        try:
            return _run(run, stopped, who)
        finally:
            sys.stdout.flush()  # here, where it can still be told
    except OSError as error:
        if error.errno not in (errno.EPIPE, *FULL):
            raise
        with contextlib.suppress(OSError, ValueError):  # what is still to be written would fail again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 141
        with contextlib.suppress(OSError):
            print(f"error: the output could not be written ({os.strerror(error.errno)})", file=sys.stderr)
        return StorageError.exit_code


def _run(run: Callable[[], int], stopped: str, who: str) -> int:
    try:
        return run()
    except KeyboardInterrupt:
        if stopped:
            print(f"\n{stopped}", file=sys.stderr)
        return 130
    except ChexfoundError as error:
        text = "\n".join([f"{who}{error}", *getattr(error, "__notes__", ())])
        print("error: " + "\n".join(shown(line, 2000) for line in text.split("\n")), file=sys.stderr)
        return error.exit_code
