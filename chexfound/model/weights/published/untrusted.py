"""Checks of what others wrote: every error on the way names the file, no name counts twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from chexfound.errors import CheckpointError, ChexfoundError, ConfigError
from chexfound.parsing.names import shown


@contextlib.contextmanager
def at(path: Path) -> Iterator[None]:
    """Say which file an error is about; one that nobody foresaw is the file's fault, and is told as that.

    Raises: CheckpointError; ConfigError, as the block does.
    """
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        if str(error).startswith(str(path)):
            raise
        raise type(error)(f"{path}: {error}") from error
    except (ChexfoundError, MemoryError):
        raise
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a parser's, of bytes that were made or damaged to mislead it
        raise CheckpointError(
            f"{path}: cannot be taken for weights ({type(error).__name__}: {shown(error, 120)}); damaged, or made so"
        ) from error


def named_once(pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name.

    Raises: CheckpointError if two have the same: one would silently take the other's place.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in pairs:
        if name in result:
            raise CheckpointError(f"two tensors are called {name}; which of them is meant cannot be told")
        result[name] = tensor
    return result
