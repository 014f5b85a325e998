"""What a step measures, and cases that fail without taking the others along."""

import os
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Cases = dict[str, Callable[[], object]]
# By measure and case: "median", "low", "high"; or "why" and "text", where it failed.
Result = dict[str, dict[str, dict[str, Any]]]
POISONED = 3


class Skipped(Exception):
    """A step that cannot run on this device; the message says why."""


def try_each(cases: dict[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, dict[str, str]]]:
    """Return what each case returns, and why each of the others failed."""
    found, failed = {}, {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            failed[name] = {"why": why, "text": traceback.format_exc()}
            if is_poisoned():
                raise
    return found, failed


def is_poisoned() -> bool:
    """Return whether an error of a kernel has ended all work on the GPU for this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def leave_if_poisoned() -> None:
    """End a process that can do no more; what started it starts another for what is left."""
    if is_poisoned():
        os._exit(POISONED)
