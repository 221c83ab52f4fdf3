"""HOME/site.yaml: what a site's operator demands, whatever the coordinator asks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from chexfound import strict_yaml
from chexfound.errors import ConfigError
from chexfound.journal import canonical
from chexfound.secagg.parameters import MINIMUM, Parameters

SIZE_MAX = 2**20
_strict = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))


@_strict
class SecAgg:
    """Of secure aggregation."""

    required: bool = False  # refuse every run that does not aggregate under masks
    colluders: Annotated[int, Field(ge=0)] | None = None  # sites that may collude with the coordinator; none: a quarter
    minimum: Annotated[int, Field(ge=MINIMUM)] = MINIMUM  # sites that a sum must be over
    attempt_s: Annotated[float, Field(gt=0)] = 86_400.0  # after which an attempt's secrets are dropped


@_strict
class Policy:
    """All sections."""

    secagg: SecAgg = SecAgg()

    @staticmethod
    def load(home: Path) -> Policy:
        """The policy of a site's home; the defaults where it has no file.

        Raises: ConfigError.
        """
        path = home / "site.yaml"
        try:
            with open(path, "rb") as file:
                text = file.read(SIZE_MAX + 1)
        except FileNotFoundError:
            return Policy()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        try:
            if len(text) > SIZE_MAX:
                raise ValueError(f"larger than {SIZE_MAX} bytes")
            values: Any = strict_yaml.load(text.decode())
            # As JSON: strict, and yet a mapping is a section.
            return TypeAdapter(Policy).validate_json(canonical({} if values is None else values))
        except ValidationError as error:
            what = "; ".join(
                f"{'.'.join(map(str, one['loc'])) or 'all of it'}: {one['msg']}" for one in error.errors()[:3]
            )
            raise ConfigError(f"{path}: {what}") from error
        except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"{path}: not a site's policy: {error}") from error

    def parameters(self, n: int) -> Parameters:
        """Of secure aggregation in a federation of n sites.

        Raises: ConfigError if they do not protect.
        """
        try:
            return Parameters.of(n, self.secagg.colluders, self.secagg.minimum)
        except ConfigError as error:
            raise ConfigError(f"site.yaml: {error}" if self != Policy() else str(error)) from error
