"""What the description of a saved conversion has to hold, checked before any of it is used."""

import math
from typing import Any


def find_wrong(content: dict[str, Any]) -> str | None:
    """Return the first entry of a description that is missing or of another form, None if none."""
    for key, (expected, form) in _ENTRIES.items():
        if key not in content and key in _ADDED:
            continue
        if key not in content:
            return f"it has no {key!r}"
        if not _fits(content[key], form):
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


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_count(value: Any) -> bool:
    return _is_whole(value) and bool(value >= 0)


def _is_prior(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _are_names(value: Any) -> bool:
    return _fits(value, [_is_text]) and len(set(value)) == len(value)


def _fits(value: Any, form: Any) -> bool:
    """Return whether a value has a form.

    A form is a function that says so; [form] of a list's items, (form, ...) of each of them; or
    what the entries of a dict have, {...: form} whatever their names.
    """
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(item, form[0]) for item in value)
    if isinstance(form, tuple):
        return isinstance(value, list) and len(value) == len(form) and all(map(_fits, value, form))
    if not isinstance(form, dict):
        return bool(form(value))
    forms = dict.fromkeys(value, form[...]) if ... in form and isinstance(value, dict) else form
    return isinstance(value, dict) and all(_fits(value.get(k), f) for k, f in forms.items())


_ADDED = {"eps"}  # folders of an earlier state have none
_TENSORS = {...: (_is_text, [_is_count])}
_NORMS = {...: {"class": _is_text, "tensors": _TENSORS}}
_BASE = {"class": _is_text, "tensors": _TENSORS, "norms": _NORMS}
_FILE = {"name": _is_text, "bytes": _is_count, "sha256": _is_text}
_ENTRIES: dict[str, tuple[str, Any]] = {
    "normswap": ("a version", _is_text),
    "method": ("a name", _is_text),
    "options": ("values by name", {...: lambda v: True}),
    "placement": ("a name or null", lambda v: v is None or _is_text(v)),
    "contexts": ("distinct names", lambda v: _are_names(v) and len(v) > 0),
    "priors": ("positive numbers", [_is_prior]),
    "unknown": ("a policy or an index", lambda v: _is_whole(v) or _is_text(v)),
    "answering": ("a number or null", lambda v: v is None or _is_count(v)),
    "sites": ("distinct names", _are_names),
    "base": ("a class, norms and tensors", _BASE),
    "values": ("checksums by name", {...: _is_whole}),
    "samples": ("checksums by name", {...: _is_whole}),
    "layers": ("dtypes and shapes by name", _TENSORS),
    "eps": ("numbers by name", {...: _is_number}),
    "others": ("distinct names", _are_names),
    "file": ("a name, bytes and sha256", _FILE),
}
