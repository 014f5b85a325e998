"""Measure which sample each row at each norm is from, by exchanging samples; see `decode`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normswap.graph.decode import change_of, code, is_open, moves_others, settle
from normswap.graph.plans import Step
from normswap.graph.samples import HOWS, exchange, fresh, is_content, rebuild, rolled

# None that a program is likely to have started from.
_SEED, _OTHER_SEEDS = 0x5EED0000, 8

# What the norms met in a run, and what each was given.
_Met = list[tuple[Step, Tensor]]


class Measurement:
    """Runs of a model on variations of one batch, and what its norms were given in them.

    Args:
        call: runs the model on arguments; its norms call `listen`.
        restore: puts the model's state and the random generators back, or seeds those; returns
            whether they had moved.
        values: arguments.
        samples: N.
        modes: id of a norm -> its mode outside of the measurement.
    """

    def __init__(
        self,
        call: Callable[[Any], Any],
        restore: Callable[..., bool],
        values: Any,
        samples: int,
        modes: dict[int, bool],
    ) -> None:
        self.call, self.restore, self.values, self.samples = call, restore, values, samples
        self.modes = modes
        # Of the random generators in each run; by default they start as they are.
        self.seed: int | None = None
        self._listener: Callable[[Any, str, Tensor], None]
        batches: list[Any] = []
        rebuild(values, samples, lambda batch: batches.append(batch) or batch)  # type: ignore[func-returns-value]
        # Vectors are lengths or labels, unless there is nothing else.
        self.least = 2 if any(is_content(batch, 2) for batch in batches) else 1
        self.possible = any(is_content(batch, self.least) for batch in batches)

    def listen(self, layer: Any, site: str, x: Tensor) -> None:
        """Take note of what a norm is given."""
        self._listener(layer, site, x.detach().reshape(x.shape[0], -1))

    def _run(self, listener: Callable[[Any, str, Tensor], None], change: Any = fresh) -> None:
        self.restore(self.seed)
        self._listener = listener
        self.call(rebuild(self.values, self.samples, change))

    def _record(self, change: Any = fresh) -> _Met:
        """Run the model; return what its norms are given."""
        met: _Met = []

        def note(layer: Any, site: str, x: Tensor) -> None:
            met.append((Step(site, self.modes.get(id(layer), False), len(x)), x.clone()))

        self._run(note, change)
        return met

    def _compare(self, met: _Met, judge: Callable[..., Any], change: Any = fresh) -> list[Any]:
        """Run the model; return what is judged of each norm as far as the path is the same."""
        found: list[Any] = []
        rest = iter(met)

        def follow(layer: Any, site: str, x: Tensor) -> None:
            nonlocal rest
            step, before = next(rest, (None, x))
            if step is not None and step.site == site and before.shape == x.shape:
                found.append(judge(step, before, x))
            else:
                rest = iter(())

        self._run(follow, change)
        return found

    def _exchange(self, met: _Met, picked: list[int], how: str, order: Any = fresh) -> list[Tensor]:
        """Return how much each row moves when these samples of a batch in an order are exchanged."""
        generator = torch.Generator().manual_seed(len(how) + 31 * sum(picked))

        def change(batch: Any) -> Any:
            batch = order(batch)
            content = is_content(batch, self.least)
            return fresh(exchange(batch, picked, how, generator)) if content else batch

        return self._compare(met, _moved, change)

    def steps(self) -> list[Step]:
        """Return every call of a norm, with what was found of its rows.

        Raises:
            Exception: whatever the model raises on its own inputs, or on all variations.
        """
        met = self._record()
        if not met:
            return []
        drawn = self.restore()
        again = self._compare(met, _moved)
        steady = not drawn and len(again) == len(met) and not any(m.any() for m in again)
        noise = [8 * float(m.max()) if m.numel() else 0.0 for m in again]
        noise += [math.inf] * (len(met) - len(noise))
        for (step, x), moves, least in zip(met, self._moves(met, noise), noise, strict=True):
            settle(step, x, moves, self.samples, least)
        self._check(met, noise, steady)
        return [step for step, _ in met]

    def _moves(self, met: _Met, noise: list[float]) -> list[Tensor | None]:
        """Return how much each word's runs move each row; None where the path depends on values."""
        length, words = code(self.samples)
        moves = [torch.zeros(length, step.rows) for step, _ in met]
        reach, failure = len(met), None
        for how in HOWS:
            for bit in range(length):
                picked = [i for i, word in enumerate(words) if bit in word]
                try:
                    moved = self._exchange(met, picked, how)
                except Exception as error:
                    # Some models take no such values; what another way tells may do.
                    failure = error
                    break
                reach = min(reach, len(moved))
                for total, one in zip(moves, moved, strict=False):
                    total[bit] = torch.maximum(total[bit], one)
            if not any(
                is_open(m, self.samples, n) for m, n in zip(moves[:reach], noise, strict=False)
            ):
                break
        if failure is not None and not any(bool(m.any()) for m in moves):
            raise failure
        return [m if at < reach else None for at, m in enumerate(moves)]

    def _check(self, met: _Met, noise: list[float], steady: bool) -> None:
        """Exchange one sample in another order, or under other seeds: its own rows may change."""
        depends = "rows whose order depends on their values"
        turns = [(rolled, None, 0, depends)] if steady else []
        changes = "rows in an order that changes from call to call"
        for turn in range(0 if steady else _OTHER_SEEDS):
            turns.append((fresh, _SEED + turn, turn % self.samples, changes))
        for order, self.seed, sample, cause in turns:
            try:
                new = self._record(order)
                moves = self._exchange(new, [sample], "others", order)
            except Exception:
                # Some orders are not the model's to take, as that of samples sorted by length.
                continue
            for (step, _), (other, _), moved, least in zip(met, new, moves, noise, strict=False):
                if (step.site, step.rows) != (other.site, other.rows):
                    break
                if not step.cause and moves_others(step, moved, sample, self.samples, least):
                    step.cause = cause


def _moved(step: Step, before: Tensor, x: Tensor) -> Tensor:
    return change_of(before, x).cpu()
