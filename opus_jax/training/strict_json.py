"""JSON that any reader accepts: NaN and infinities are not numbers there, and NumPy scalars are not known."""

import json
import math
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """`value` with arrays and NumPy or JAX scalars turned into Python numbers and lists.

    Raises:
      TypeError: a value is no number, text, mapping or sequence.
    """
    if value is None or isinstance(value, bool | str | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError(f"cannot write {type(value).__name__} as JSON")
    # bfloat16 and its like are not Python numbers until they are float32
    return (array.astype(np.float32) if array.dtype.kind == "V" else array).tolist()


def encode(value: dict[str, Any], **options: Any) -> str:
    """One JSON object; a non-finite number becomes null and is named, with what it was, under `nonfinite`."""
    nonfinite: dict[str, str] = {}
    cleaned = _without_nonfinite(plain(value), "", nonfinite)
    if nonfinite:
        cleaned["nonfinite"] = nonfinite
    return json.dumps(cleaned, allow_nan=False, **options)


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a nested mapping, under names like `bits_per_byte/web`; all else is left out."""
    flat: dict[str, float] = {}
    for key, item in plain(value).items():
        if isinstance(item, dict):
            flat |= flatten(item, f"{prefix}{key}/")
        elif isinstance(item, bool | int | float) and math.isfinite(item):
            flat[prefix + key] = float(item)
    return flat


def _without_nonfinite(value: Any, name: str, found: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item, f"{name}/{key}" if name else key, found) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(item, f"{name}/{i}", found) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found[name] = str(value)
        return None
    return value
