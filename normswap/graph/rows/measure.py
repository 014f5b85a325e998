"""Measure which sample each row at each norm is from, by exchanging samples; see `decode`."""

import math
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normswap.functional.backend import WATCHED
from normswap.functional.label_rows import Layer
from normswap.graph.rows.decode import change_of, code, hold_once, is_open, moves_others, settle
from normswap.graph.rows.plans import FOLDED, ONE, Step
from normswap.graph.rows.sample_flow import SampleFlow
from normswap.graph.rows.samples import batches_in, fresh, vary
from normswap.graph.rows.variations import HOWS, ended, exchange, rank_of, rolled, shifted

# None that a program is likely to have started from.
_OTHER_SEEDS = range(0x5EED0000, 0x5EED0008)

# What the norms met in a run, and what each was given.
_Met = list[tuple[Step, Tensor]]


@dataclass(eq=False)
class Measurement:
    """Runs of a model on variations of one batch, and what its norms were given in them.

    Attributes:
        call: runs the model on arguments; its norms call `listen`.
        restore: puts the model's state and the random generators back, or seeds those; returns
            whether they had moved.
        values: arguments.
        samples: N.
        modes: id of a norm -> its mode outside of the measurement.
        batches: what a list of as many tensors as each has rows is taken for: one sample each, or
            batches.
        seed: of the random generators in each run; by default they start as they are.
        varied: whether samples could be changed at all.
    """

    call: Callable[[Any], Any]
    restore: Callable[..., bool]
    values: Any
    samples: int
    modes: dict[int, bool]
    batches: bool
    seed: int | None = None
    varied: bool = False
    _flow: SampleFlow | None = None
    _before: Iterator[tuple[Step, Tensor]] | None = None
    _found: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        found, self.beside = batches_in(self.values, self.samples, self.batches)
        ranks = [rank_of(batch) for batch in found]
        self.rank = max([0, *ranks])
        self.possible = self.rank in ranks
        self.others = any(rank < self.rank for rank in ranks)

    def listen(self, layer: Layer, site: str, x: Tensor) -> None:
        """Keep what a norm is given, or compare it with what it was given before."""
        if self._flow is not None:
            times = self._flow.rows_a_sample(x)
            how = "" if times is None else ONE if times == 1 else FOLDED
            self._found.append(Step(site, self.modes.get(id(layer), False), len(x), how, times))
            return
        x = x.detach().reshape(x.shape[0], -1)
        if self._before is None:
            step = Step(site, self.modes.get(id(layer), False), len(x))
            self._found.append((step, x.clone()))
            return
        step, before = next(self._before, (Step("", False, 0), x))
        if step.site == site and before.shape == x.shape:
            self._found.append(change_of(before, x).cpu())
        else:
            self._before = iter(())

    def follow(self) -> list[Step]:
        """Return every call of a norm, where operators of one run tell its rows; else nothing."""
        batches, beside = batches_in(self.values, self.samples, self.batches)
        if beside or self.others or {type(batch) for batch in batches} != {Tensor}:
            return []
        self._flow = flow = SampleFlow(self.samples)
        watched = WATCHED.set(True)
        try:
            with flow:
                self._run(lambda batch: flow.follow(fresh(batch)))
        except Exception:  # which a run that measures meets, too
            return []
        finally:
            WATCHED.reset(watched)
            self._flow = None
        steps: list[Step] = self._found
        drawn = self.restore()
        return [] if drawn or not all(step.how for step in steps) else steps

    def _run(
        self,
        change: Callable[[Any], Any] = fresh,
        before: _Met | None = None,
        beside: Callable[[Any], Any] = fresh,
    ) -> list[Any]:
        """Run the model; return what each norm is given.

        Where that of another run is given, return how much each row moved instead, as far as the
        path is the same.
        """
        self.restore(self.seed)
        self._before, self._found = None if before is None else iter(before), []
        values = vary(self.values, self.samples, change, self.batches, beside)
        copy_context().run(self.call, values)
        return self._found

    def _exchange(
        self, met: _Met, picked: list[int], how: str, order: Any = fresh, beside: Any = fresh
    ) -> list[Tensor]:
        """Return how much each row moves when some samples, of a batch in an order, change."""
        generator = torch.Generator().manual_seed(len(how) + 31 * sum(picked))

        def change(batch: Any) -> Any:
            batch = order(batch)
            if rank_of(batch) < self.rank:
                return batch
            new = exchange(batch, picked, how, generator)
            # Samples that hold theirs are taken to differ.
            self.varied |= not isinstance(batch, Tensor) or not torch.equal(new, batch)
            return new

        return self._run(change, met, beside)

    def steps(self, brief: bool = False) -> list[Step]:
        """Return every call of a norm, with what was found of its rows; see `Run.measure`.

        Raises:
            Exception: whatever the model raises on its own inputs, or on all variations.
        """
        met: _Met = self._run()
        if not met:
            return []
        drawn = self.restore()
        again = self._run(fresh, met)
        # From one state of the random generators.
        steady = len(again) == len(met) and not any(m.any() for m in again)
        noise = [8 * float(m.max()) if m.numel() else 0.0 for m in again]
        noise += [math.inf] * (len(met) - len(noise))
        for (step, x), moves, least in zip(met, self._moves(met, noise), noise, strict=True):
            settle(step, x, moves, self.samples, least)
        if brief:
            return [step for step, _ in met]
        if steady:
            cause = "rows whose order depends on their values"
            self._check(met, noise, 0, partial(self._vary, content=rolled, others=fresh), cause)
        for sample, self.seed in enumerate(_OTHER_SEEDS if drawn or not steady else ()):
            cause = "rows in an order that changes from call to call"
            self._check(met, noise, sample % self.samples, fresh, cause)
        self.seed = None
        if self.others:
            self._check(met, noise, 0, partial(self._vary, content=fresh, others=rolled))
        for at in {self.samples - 1, (self.samples - 1) // 2}:
            self._check(met, noise, at, partial(ended, at=at))
        if self.beside:
            self._check(met, noise, 0, beside=shifted)
        return [step for step, _ in met]

    def _vary(self, batch: Any, content: Callable[[Any], Any], others: Callable[[Any], Any]) -> Any:
        """Change samples in one way, and in another the lengths, flags and labels beside them."""
        return (others if rank_of(batch) < self.rank else content)(batch)

    def _moves(self, met: _Met, noise: list[float]) -> list[Tensor | None]:
        """Return how much each word's runs move each row; None where the path depends on values."""
        length, words = code(self.samples)
        moves = [torch.zeros(length, step.rows, device="cpu") for step, _ in met]
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
            if not any(map(is_open, moves[:reach], [self.samples] * reach, noise)):
                break
        if failure is not None and not any(bool(m.any()) for m in moves):
            raise failure
        return [m if at < reach else None for at, m in enumerate(moves)]

    def _check(
        self,
        met: _Met,
        noise: list[float],
        sample: int,
        order: Any = fresh,
        cause: str = "",
        beside: Any = fresh,
    ) -> None:
        """Exchange a sample once more, of another batch, beside others or after another seed.

        Where rows that are not its own move, there is the cause; without one, the finding holds
        for this call alone, as it does where a norm is given another number of rows then.
        """
        try:
            new: _Met = self._run(order, beside=beside)
            moves = self._exchange(new, [sample], "others", order, beside)
        except Exception:
            if order is fresh and beside is fresh:
                raise
            # Some batches are not the model's to take, as lengths that no sample has.
            return
        found = [*zip(new, moves, strict=False)]
        for at, (step, x) in enumerate(met):
            there = at < len(found) and found[at][0][0].site == step.site
            alike = there and found[at][0][0].rows == step.rows
            if cause and not alike:
                return
            if not there:
                found = []
            if step.cause or (
                alike and not moves_others(step, found[at][1], sample, self.samples, noise[at])
            ):
                continue
            if cause:
                step.cause = cause
            else:
                hold_once(step, self.samples, x.device)
