"""Errors as messages: an exit code and one word, explained in the reader's own words."""

from __future__ import annotations

from flwr.app import Error, Message

from chexfound.errors import (
    CODES,
    REFUSALS,
    ChexfoundError,
    CodeError,
    RefusedError,
    RosterError,
    StateError,
    VersionError,
)
from chexfound.parsing.names import is_name as is_name  # the rule for every name that arrives

# What Flower itself reports, by its error codes: from the site's node, or in its stead.  Our own
# replies use the same field, and are told apart by their reason, which is always one of our words.
FLOWER_ERRORS = {
    1: "could not load the ClientApp",
    2: "the ClientApp raised an exception",
    3: "the message is gone or incomplete at the coordinator",
    4: "the reply is gone or incomplete at the coordinator",
    5: "is no longer connected",
    7: "refused the app that the coordinator sent",
    8: "the ClientApp's process died",
}
HINTS: dict[type[ChexfoundError], str] = {  # what to do about an error that a site replied with
    StateError: "resume the run, which sends it the teacher",
    VersionError: "install the same release at both ends",
    CodeError: "its operator has not approved this run's code there: chexfound-client approve",
    RosterError: "its operator has not approved the federation's present sites: give it the present "
    "NAME.federation.json, for chexfound-client join",
}


def pack_error(error: ChexfoundError, request: Message) -> Message:
    """An error reply: the exit code and its one word, never the exception's text."""
    return Message(Error(code=error.exit_code, reason=error.code), reply_to=request)


def unpack_error(message: Message) -> type[ChexfoundError]:
    """The kind of error that a site reports; ChexfoundError for a code that is not ours."""
    reason = str(message.error.reason)
    return RefusedError if reason in REFUSALS else CODES.get(reason, ChexfoundError)


def error_code(message: Message) -> str:
    """The one word that a site reports; that of ChexfoundError for a word that is not ours."""
    reason = str(message.error.reason)
    return reason if reason in REFUSALS else unpack_error(message).code


def explain_error(message: Message) -> str:
    """Give what an error message says, in our own words: the sender's text is never repeated."""
    kind, code = unpack_error(message), error_code(message)
    if (message.error.code, message.error.reason) == (RefusedError.exit_code, code) and code in REFUSALS:
        return f"refused ({code}): {REFUSALS[code]}"
    if (message.error.code, message.error.reason) == (kind.exit_code, kind.code):
        hint = f"; {HINTS[kind]}" if kind in HINTS else ""
        return f"replied with error {kind.code!r} (exit code {kind.exit_code}){hint}"
    return FLOWER_ERRORS.get(message.error.code, f"failed with Flower's error code {message.error.code:d}")
