"""Tell which sample each row is of from the runs in which it changed.

Each sample is exchanged in the runs of its word of a code. All words have the same weight, so a
row that changes in the runs of one word is from that sample; one that changes in more is from
several, as a union of words is heavier than any; one that never changes is from none.
"""

import itertools
import math

import torch
from torch import Tensor

from normswap.graph.rows.plans import (
    DEAD,
    FOLDED,
    NO_SAMPLE,
    ONE,
    PERMUTED,
    REPEATED,
    UNSURE,
    Step,
)

MADE_OF_SEVERAL = "rows made of several samples"
_NONE, _SEVERAL, _UNSURE = -1, -2, -3
_KINDS = {_NONE: NO_SAMPLE, _SEVERAL: MADE_OF_SEVERAL, _UNSURE: UNSURE}
# A row is taken for one sample's, though others move it too, where its own moves it this much more.
_DOMINANT = 10.0


def code(samples: int) -> tuple[int, list[frozenset[int]]]:
    """Return the length of the words and a word for each sample; all of one weight."""
    length = next(k for k in itertools.count(2) if math.comb(k, k // 2) >= samples)
    words = itertools.combinations(range(length), length // 2)
    return length, [frozenset(word) for word in itertools.islice(words, samples)]


def _samples_of_rows(moves: Tensor, samples: int, noise: float) -> list[int]:
    """Return the sample of each row, or why there is none.

    Args:
        moves: how much each row moved in each run, (length of words, rows).
        samples: N.
        noise: how much rows move by themselves.
    """
    words = code(samples)[1]
    table = {word: i for i, word in enumerate(words)}
    found = []
    for hits in (moves > noise).T.tolist():
        word = frozenset(i for i, hit in enumerate(hits) if hit)
        less = _SEVERAL if len(word) >= len(words[0]) else _UNSURE
        found.append(table.get(word, less) if word else _NONE)
    return found


def is_open(moves: Tensor, samples: int, noise: float) -> bool:
    """Return whether some rows have not told their sample yet."""
    return bool({_NONE, _UNSURE} & set(_samples_of_rows(moves, samples, noise)))


def settle(step: Step, x: Tensor, moves: Tensor | None, samples: int, noise: float) -> None:
    """Say how the rows x of a norm follow from the samples; see `_samples_of_rows`."""
    if moves is None:
        step.cause = "rows whose number or order depends on their values"
        return
    if noise > 1:
        step.cause = "rows that are not the same when the same batch runs again"
        return
    rows = _samples_of_rows(moves, samples, noise)
    how = _find_order(rows, samples, x)
    if how is None and _SEVERAL in rows:
        strong = (moves > moves.amax(0) / _DOMINANT).float()
        how = _find_order(_samples_of_rows(strong, samples, 0.0), samples, x)
    if how is not None:
        step.how, step.times = how, step.rows // samples
    elif min(rows) >= 0:
        step.how, step.index = PERMUTED, torch.tensor(rows, device=x.device)
    else:
        parts = [f"{rows.count(k)} {what}" for k, what in _KINDS.items() if k in rows]
        step.cause = f"{' and '.join(parts)} of {step.rows}"


def _slots(how: str, rows: int, samples: int) -> Tensor:
    """Return where the rows of each sample are, (N, rows a sample)."""
    order = torch.arange(rows, device="cpu")
    return order.view(-1, samples).T if how == REPEATED else order.view(samples, -1)


def _owners(step: Step, samples: int) -> Tensor:
    """Return the sample of each row, (rows,)."""
    if step.index is not None:
        return step.index
    owners = torch.empty(step.rows, dtype=torch.int64, device="cpu")
    owners[_slots(step.how, step.rows, samples)] = torch.arange(samples, device="cpu").unsqueeze(1)
    return owners


def moves_others(step: Step, moved: Tensor, sample: int, samples: int, noise: float) -> bool:
    """Return whether exchanging a sample moves rows that are not its own, as much as any."""
    least = max(noise, float(moved.max()) / _DOMINANT if len(moved) else 0.0)
    return bool((moved > least)[_owners(step, samples).cpu() != sample].any())


def hold_once(step: Step, samples: int, device: torch.device) -> None:
    """Have a finding hold for this call alone, as an order without a rule does."""
    step.index = _owners(step, samples).to(device)
    step.how, step.times = PERMUTED, None


def _find_order(rows: list[int], samples: int, x: Tensor) -> str | None:
    """Return the one regular order that explains the rows.

    Rows from no sample, as padding or where activations are dead, follow it where they are equal
    in every sample, but for rounding: products of matrices round some rows in another order.
    """
    if not rows or len(rows) % samples:
        return None
    fits, least = [], min(64 * torch.finfo(x.dtype).eps, 1e-4)
    for how in (FOLDED, REPEATED):
        slots = _slots(how, len(rows), samples).T.tolist()
        empty = [[row for row in slot if rows[row] == _NONE] for slot in slots]
        if all(rows[row] in (i, _NONE) for slot in slots for i, row in enumerate(slot)) and all(
            not (change_of(x[slot[:1]], x[[row]]) > least).any()
            for slot in empty
            for row in slot[1:]
        ):
            fits.append(how)
    if len(rows) == samples:
        return None if not fits else DEAD if _NONE in rows else ONE
    return fits[0] if len(fits) == 1 else None


def change_of(x: Tensor, y: Tensor) -> Tensor:
    """Return how much each row differs, by its own largest value."""
    if x.is_complex():
        x, y = (torch.view_as_real(t).flatten(1) for t in (x, y))
    if x.dtype != torch.float64:
        x, y = x.float(), y.float()
    if not x.shape[1]:
        return x.new_zeros(len(x))
    change, scale = (x - y).abs().amax(1), x.abs().amax(1)
    if not bool((change + scale).isfinite().all()):
        x, y = x.nan_to_num(), y.nan_to_num()
        change, scale = (x - y).abs().amax(1), x.abs().amax(1)
    return change / scale.clamp_min(1e-30)
