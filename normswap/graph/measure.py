"""Measure which sample each row at each norm is from, by exchanging samples.

The model runs on its own inputs and on some in which samples are exchanged, each sample in the
runs of its word of a code. All words have the same weight, so a row that changes in the runs of
one word is from that sample; one that changes in more is from several, as a union of words is
heavier than any; one that never changes is from none.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normswap.graph.plans import FOLDED, ONE, PERMUTED, REPEATED, Step
from normswap.graph.samples import HOWS, copied, exchange, is_content, rebuild, rolled

_NONE, _SEVERAL, _UNSURE = -1, -2, -3
_KINDS = {
    _NONE: "rows from no sample",
    _SEVERAL: "rows made of several samples",
    _UNSURE: "rows that do not tell their sample",
}
# None that a program is likely to have started from.
_SEED, _OTHER_SEEDS = 0x5EED0000, 8
# A row is taken for one sample's, though others move it too, where its own moves it this much more.
_DOMINANT = 10.0
# What counts as another row and as the same row, by its largest value; how many are compared.
_AWAY, _NEAR = 1e-2, 1e-4
_MOST_ROWS, _MOST_VALUES = 64, 4096


def code(samples: int) -> tuple[int, list[frozenset[int]]]:
    """Return the length of the words and a word for each sample; all of one weight."""
    length = next(k for k in itertools.count(2) if math.comb(k, k // 2) >= samples)
    words = itertools.combinations(range(length), length // 2)
    return length, [frozenset(word) for word in itertools.islice(words, samples)]


class Measurement:
    """Runs of a model on variations of one batch, and what its norms were given in them.

    Args:
        call: runs the model on arguments; its norms call `listen`.
        undo: puts the model's state and the random generators back, or seeds those; returns
            whether they had moved.
        values: arguments.
        samples: N.
        modes: id of a norm -> its mode outside of the measurement.
    """

    def __init__(
        self,
        call: Callable[[Any], Any],
        undo: Callable[..., bool],
        values: Any,
        samples: int,
        modes: dict[int, bool],
    ) -> None:
        self.call, self.undo, self.values, self.samples = call, undo, values, samples
        self.modes = modes
        # Of the random generators in each run; by default they start as they are.
        self.seed: int | None = None
        self.base: list[tuple[Step, Tensor]] = []
        self.judge: Callable[[int, Tensor], Any] | None = None
        self.judged: list[Any] = []
        self.astray = False
        batches: list[Any] = []

        def note(batch: Any) -> Any:
            batches.append(batch)
            return batch

        rebuild(values, samples, note)
        # Vectors are lengths or labels, unless there is nothing else.
        self.least = 2 if any(is_content(batch, 2) for batch in batches) else 1
        self.possible = any(is_content(batch, self.least) for batch in batches)

    def listen(self, layer: Any, site: str, x: Tensor) -> None:
        """Note what a norm is given, or compare it with the first run."""
        x = x.detach().reshape(x.shape[0], -1)
        if self.judge is None:
            step = Step(site, self.modes.get(id(layer), False), x.shape[0])
            self.base.append((step, x.clone()))
            return
        at = len(self.judged)
        if self.astray or at == len(self.base):
            return
        step, before = self.base[at]
        if site == step.site and x.shape == before.shape:
            self.judged.append(self.judge(at, x))
        else:
            self.astray = True

    def run(
        self,
        change: Callable[[Any], Any] = copied,
        judge: Callable[[int, Tensor], Any] | None = None,
    ) -> list[Any]:
        """Run the model once; return what is judged of each norm as far as the path is the same."""
        self.undo(self.seed)
        self.judge = judge or self._moved
        self.judged, self.astray = [], False
        self.call(rebuild(self.values, self.samples, change))
        return self.judged

    def start(self) -> None:
        """Run the model on the arguments as they are."""
        self.undo(self.seed)
        self.judge = None
        self.call(rebuild(self.values, self.samples, copied))

    def exchanged(self, picked: list[int], how: str) -> list[Tensor]:
        """Return how much each row moves when these samples are exchanged."""
        generator = torch.Generator().manual_seed(len(how) + 31 * sum(picked))

        def change(batch: Any) -> Any:
            if not is_content(batch, self.least):
                return copied(batch)
            return copied(exchange(batch, picked, how, generator))

        return self.run(change)

    def _moved(self, at: int, x: Tensor) -> Tensor:
        return change_of(self.base[at][1], x).cpu()

    def steps(self) -> list[Step]:
        """Return every call of a norm, with what was found of its rows.

        Raises:
            Exception: whatever the model raises on its own inputs, or on all variations.
        """
        self.start()
        if not self.base:
            return []
        drawn = self.undo()
        again = self.run()
        steady = not drawn and len(again) == len(self.base) and not any(m.any() for m in again)
        noise = [8 * float(m.max()) if m.numel() else 0.0 for m in again]
        noise += [math.inf] * (len(self.base) - len(noise))
        found = self._decode(noise)
        for at, (step, x) in enumerate(self.base):
            self._settle(step, x, found[at], noise[at])
        if steady:
            self._check_order()
        else:
            self._check_seeds(noise)
        return [step for step, _ in self.base]

    def _decode(self, noise: list[float]) -> list[Tensor | None]:
        """Return how much each word's runs move each row; None where the path depends on values."""
        length, words = code(self.samples)
        moves = [torch.zeros(length, step.rows) for step, _ in self.base]
        reach, failure = len(self.base), None
        for how in HOWS:
            for bit in range(length):
                picked = [i for i, word in enumerate(words) if bit in word]
                try:
                    moved = self.exchanged(picked, how)
                except Exception as error:
                    # Some models take no such values; what another way tells may do.
                    failure = error
                    break
                reach = min(reach, len(moved))
                for total, one in zip(moves, moved, strict=False):
                    total[bit] = torch.maximum(total[bit], one)
            rows = [_rows(m, words, n) for m, n in zip(moves[:reach], noise, strict=False)]
            if not any(row in (_NONE, _UNSURE) for found in rows for row in found):
                break
        if failure is not None and not any(bool(m.any()) for m in moves):
            raise failure
        return [m if at < reach else None for at, m in enumerate(moves)]

    def _settle(self, step: Step, x: Tensor, moves: Tensor | None, noise: float) -> None:
        """Say how the rows of a norm follow from the samples."""
        if moves is None:
            step.cause = "rows whose number or order depends on their values"
            return
        if noise > 1:
            step.cause = "rows that are not the same when the same batch runs again"
            return
        _, words = code(self.samples)
        rows = _rows(moves, words, noise)
        how = _regular(rows, self.samples, x)
        if how is None and _SEVERAL in rows:
            strong = moves > moves.amax(0) / _DOMINANT
            how = _regular(_rows(strong.float(), words, 0.0), self.samples, x)
        if how is not None:
            step.how, step.times = how, step.rows // self.samples
        elif min(rows) >= 0:
            step.how, step.index = PERMUTED, torch.tensor(rows, device=x.device)
        else:
            parts = [f"{rows.count(k)} {what}" for k, what in _KINDS.items() if k in rows]
            step.cause = f"{' and '.join(parts)} of {step.rows}"

    def _check_order(self) -> None:
        """Run the samples in another order: rows have to move along, whatever their values."""
        try:
            found = self.run(rolled, judge=self._stays)
        except Exception:
            # Some orders are not the model's to take, as that of samples sorted by length.
            return
        for (step, _), stays in zip(self.base, found, strict=False):
            if stays:
                step.refuse("rows whose order depends on their values")

    def _stays(self, at: int, x: Tensor) -> bool:
        """Return whether a row is not one of the sample that has come there, but another's."""
        step, before = self.base[at]
        if not step.how:
            return False
        owners = _samples_of(step, self.samples).to(x.device)
        picked = torch.arange(len(x), device=x.device)
        if step.regular:
            slots = _slots(step.how, step.rows, self.samples).to(x.device)
            expected = torch.empty_like(x)
            expected[slots] = before[slots.roll(1, 0)]
            picked = picked[change_of(expected, x) > _AWAY]
        # Enough of the rows and of their values.
        picked = picked[:: len(picked) // _MOST_ROWS + 1]
        stride = x.shape[1] // _MOST_VALUES + 1
        x, before = (wide(t[:, ::stride].contiguous()) for t in (x[picked], before))
        apart = torch.cdist(x, before, p=math.inf) / _largest(x).clamp_min(1e-30).unsqueeze(1)
        apart = apart.nan_to_num(math.inf)
        own = owners == (owners[picked].unsqueeze(1) - 1) % self.samples
        from_own = apart.masked_fill(~own, math.inf).amin(1)
        from_other = apart.masked_fill(own, math.inf).amin(1)
        return bool(((from_own > _AWAY) & (from_other < _NEAR)).any())

    def _check_seeds(self, noise: list[float]) -> None:
        """Exchange one sample under other seeds: only the rows that are its own may change."""
        found = self.base
        for turn in range(_OTHER_SEEDS):
            self.base, self.seed = [], _SEED + turn
            self.start()
            sample = turn % self.samples
            moves = self.exchanged([sample], "others")
            for (step, _), (new, _), moved, least in zip(
                found, self.base, moves, noise, strict=False
            ):
                if (step.site, step.rows) != (new.site, new.rows):
                    break
                others = _samples_of(step, self.samples) != sample if step.how else None
                if others is not None and bool((moved > least)[others].any()):
                    step.refuse("rows in an order that changes from call to call")
        self.base = found


def change_of(x: Tensor, y: Tensor) -> Tensor:
    """Return how much each row differs, by its own largest value."""
    x, y = wide(x), wide(y)
    if not x.shape[1]:
        return x.new_zeros(len(x))
    change, scale = _largest(x - y), _largest(x)
    if not bool((change + scale).isfinite().all()):
        x, y = x.nan_to_num(), y.nan_to_num()
        change, scale = _largest(x - y), _largest(x)
    return change / scale.clamp_min(1e-30)


def wide(x: Tensor) -> Tensor:
    """Return rows as floating-point numbers in which they can be compared."""
    if x.is_complex():
        x = torch.view_as_real(x).flatten(1)
    return x if x.dtype == torch.float64 else x.float()


def _largest(x: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(x, math.inf, 1)
    return largest


def _rows(moves: Tensor, words: list[frozenset[int]], noise: float) -> list[int]:
    """Return the sample of each row, or why there is none."""
    table = {word: i for i, word in enumerate(words)}
    found = []
    for hits in (moves > noise).T.tolist():
        word = frozenset(i for i, hit in enumerate(hits) if hit)
        less = _SEVERAL if len(word) >= len(words[0]) else _UNSURE
        found.append(table.get(word, less) if word else _NONE)
    return found


def _slots(how: str, rows: int, samples: int) -> Tensor:
    """Return where the rows of each sample are, (N, rows a sample)."""
    order = torch.arange(rows)
    return order.view(-1, samples).T if how == REPEATED else order.view(samples, -1)


def _samples_of(step: Step, samples: int) -> Tensor:
    if step.index is not None:
        return step.index.cpu()
    owners = torch.empty(step.rows, dtype=torch.int64)
    owners[_slots(step.how, step.rows, samples)] = torch.arange(samples).unsqueeze(1)
    return owners


def _regular(rows: list[int], samples: int, x: Tensor) -> str | None:
    """Return the one regular order that explains the rows.

    Rows from no sample, as padding, follow it where they are equal in every sample.
    """
    times, rest = divmod(len(rows), samples)
    if rest or not times:
        return None
    fits = []
    for how in (FOLDED, REPEATED):
        slots = _slots(how, len(rows), samples).T.tolist()
        if all(rows[row] in (i, _NONE) for slot in slots for i, row in enumerate(slot)) and all(
            _alike(x, [row for row in slot if rows[row] == _NONE]) for slot in slots
        ):
            fits.append(how)
    if times == 1:
        return ONE if fits else None
    return fits[0] if len(fits) == 1 else None


def _alike(x: Tensor, rows: list[int]) -> bool:
    return all(bool((change_of(x[rows[:1]], x[[row]]) == 0).all()) for row in rows[1:])
