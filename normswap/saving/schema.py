"""What the description of a saved conversion has to hold, checked before any of it is used."""

import math
from collections.abc import Callable
from typing import Any


def find_wrong(content: dict[str, Any]) -> str | None:
    """Return the first entry of a description that is missing or of another form, None if none."""
    for key, (expected, fits) in _ENTRIES.items():
        if key not in content:
            return f"it has no {key!r}"
        if not fits(content[key]):
            return f"expected {key!r} as {expected}, got {str(content[key])[:80]!r}"
    count, priors, unknown = (content[key] for key in ("contexts", "priors", "unknown"))
    if len(priors) != len(count):
        return f"expected {len(count)} priors, one a context, got {len(priors)}"
    if isinstance(unknown, int) and unknown not in range(len(count)):
        return f"expected 'unknown' as one of {len(count)} contexts, got {unknown}"
    if content["answering"] is not None and not 0 < content["answering"] <= len(count):
        return f"expected 'answering' as up to {len(count)} contexts, got {content['answering']}"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_tensors(value: Any) -> bool:
    """Return whether a value tells the dtype and shape of tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(t, list)
        and len(t) == 2
        and _is_text(t[0])
        and isinstance(t[1], list)
        and all(map(_is_count, t[1]))
        for t in value.values()
    )


def _is_sums(value: Any) -> bool:
    return isinstance(value, dict) and all(type(s) is int for s in value.values())


def _is_base(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("class"))
        and _is_tensors(value.get("tensors"))
        and isinstance(value.get("norms"), dict)
        and all(
            isinstance(norm, dict)
            and _is_text(norm.get("class"))
            and _is_tensors(norm.get("tensors"))
            for norm in value["norms"].values()
        )
    )


def _is_priors(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(p, float) and math.isfinite(p) and p > 0 for p in value
    )


def _is_file(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("name"))
        and _is_count(value.get("bytes"))
        and _is_text(value.get("sha256"))
    )


_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "normswap": ("a version", _is_text),
    "method": ("a name", _is_text),
    "options": ("values by name", lambda v: isinstance(v, dict)),
    "placement": ("a name or null", lambda v: v is None or _is_text(v)),
    "contexts": ("distinct names", lambda v: _is_texts(v) and len(v) > 0),
    "priors": ("positive numbers", _is_priors),
    "unknown": ("a policy or an index", lambda v: type(v) is int or _is_text(v)),
    "answering": ("a number or null", lambda v: v is None or _is_count(v)),
    "sites": ("distinct names", _is_texts),
    "base": ("a class, norms and tensors", _is_base),
    "values": ("checksums by name", _is_sums),
    "samples": ("checksums by name", _is_sums),
    "layers": ("dtypes and shapes by name", _is_tensors),
    "others": ("distinct names", _is_texts),
    "file": ("a name, bytes and sha256", _is_file),
}
