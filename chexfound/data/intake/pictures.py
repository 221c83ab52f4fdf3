"""PNG and JPEG pictures to 8-bit grey pixels, and the readers of pictures by suffix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from chexfound.errors import DataError

if TYPE_CHECKING:
    import numpy as np


def read_picture(path: Path) -> np.ndarray:
    """Decode a PNG or JPEG to grey uint8 (height, width); 16-bit grey is stretched from its range.

    Raises: DataError "PATH: REASON" if it is truncated, damaged, constant, or of too many pixels.
    """
    import numpy as np
    from PIL import Image as Picture

    from chexfound.data.intake.dicom import LARGEST_PIXELS, stretch, too_many

    try:
        # Pillow, since OpenCV fills what is missing of a truncated file with grey and says nothing.
        with Picture.open(path, formats=("PNG", "JPEG")) as picture:
            if reason := too_many(picture.width * picture.height):
                raise DataError(f"{path}: {reason}")
            if picture.mode.startswith("I"):
                grey = stretch(np.asarray(picture))
            else:
                grey = np.asarray(picture.convert("L"))
    except DataError:
        raise
    except Picture.DecompressionBombError as error:  # from about 1.8 · 10**8 pixels, Pillow is first
        raise DataError(f"{path}: {too_many(LARGEST_PIXELS + 1)}") from error
    except Exception as error:  # as for DICOM: any codec, any exception
        raise DataError(
            f"{path}: cannot be decoded ({type(error).__name__}); the file is damaged or not an image"
        ) from error
    if grey is None or grey.min() == grey.max():
        raise DataError(f"{path}: constant pixels")
    return grey


# By suffix, in small letters: what reads a picture that is no DICOM as grey uint8 (height, width).  It raises DataError
# "PATH: REASON" for whatever it cannot read, and nothing else: pictures come from outside.
READERS: dict[str, Callable[[Path], np.ndarray]] = {".png": read_picture, ".jpg": read_picture, ".jpeg": read_picture}
