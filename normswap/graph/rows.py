"""How the rows a norm sees follow from the samples, where a model folds more into the batch.

With r rows a sample, windows and tokens are usually folded with the samples outermost (sample 0
has the first r rows); concatenated inputs and time-major folds have them innermost (sample 0 has
every N-th row). Which it is cannot be seen from a shape, so the first mixed batch is tried twice,
without gradients and in eval mode, once with another sample in place of sample 0: the rows that
change are its rows.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ContextError

_OUTER, _INNER, _MIXED = "samples outermost", "samples innermost", "mixed"


class LayoutUnknown(Exception):
    """A norm met folded rows whose layout is not known yet; the entry of the model finds out."""


class Rows:
    """What a converted model knows of the layout of its norms' rows, by name of the norm."""

    def __init__(self) -> None:
        self.layouts: dict[str, str] = {}
        self.settled = False
        self.watching = False
        self.seen: dict[str, list[tuple[Tensor, int]]] | None = None

    def innermost(self, site: str, x: Tensor, samples: int) -> bool:
        """Return whether the samples are innermost in the rows of x, given at a norm.

        Raises:
            ContextError: its rows are neither; labels cannot follow them.
            LayoutUnknown: for the entry of the model.
        """
        if self.seen is not None:
            sums = x.detach().reshape(x.shape[0], -1).double().sum(1)
            self.seen.setdefault(site, []).append((sums, samples))
            return False
        layout = self.layouts.get(site)
        if layout is None and self.watching and not torch.compiler.is_compiling():
            raise LayoutUnknown
        if layout == _MIXED:
            raise ContextError(
                f"expected the rows of the input of {site} to be the samples in order, each r "
                f"times or all r times over, got {x.shape[0]} rows of {samples} samples in "
                "another order, so that labels cannot follow; leave the norm out with exclude="
            )
        return layout == _INNER

    def run(self, module: nn.Module, call: Callable[[Any], Any], values: Any, samples: int) -> Any:
        """Run a model's entry; learn the layout of folded rows on the way if it is not known."""
        undo = None if self.settled else _remember(module)
        self.watching = True
        try:
            output = call(values)
            self.settled = True
            return output
        except LayoutUnknown:
            if undo is not None:
                undo()
        finally:
            self.watching = False
        self._learn(module, call, values, samples)
        self.settled = True
        return call(values)

    def _learn(self, module: nn.Module, call: Callable[[Any], Any], values: Any, n: int) -> None:
        undo = _remember(module)
        modes = [(m, m.training) for m in module.modules()]
        runs = []
        try:
            for m, _ in modes:
                m.__dict__["training"] = False
            for inputs in (values, tuple(_exchange(value, n) for value in values)):
                self.seen = {}
                with torch.no_grad():
                    call(inputs)
                runs.append(self.seen)
                undo()
        finally:
            self.seen = None
            for m, mode in modes:
                m.__dict__["training"] = mode
        for site, calls in runs[0].items():
            self.layouts[site] = _decide(calls, runs[1].get(site, []))

    def __getstate__(self) -> dict[str, Any]:
        """Copies know the layouts; no run is under way in them."""
        return {"layouts": dict(self.layouts), "settled": self.settled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore."""
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)


def _decide(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> str:
    """Return the layout that explains which rows changed, over all calls of one norm."""
    if len(before) != len(after):
        return _MIXED
    found = set()
    for (one, n), (other, _) in zip(before, after, strict=True):
        if one.shape != other.shape:
            return _MIXED
        tolerance = 1e-6 * one.abs().max().clamp(min=1e-30)
        changed = ((one - other).abs() > tolerance).nonzero().flatten().tolist()
        repeats = one.shape[0] // n
        outer = all(row < repeats for row in changed)
        inner = all(row % n == 0 for row in changed)
        if not (outer or inner):
            return _MIXED
        if outer != inner:
            found.add(_OUTER if outer else _INNER)
    if len(found) > 1:
        return _MIXED
    return found.pop() if found else _OUTER


def _exchange(value: Any, n: int) -> Any:
    """Return an argument whose first sample is a copy of its last."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] != n:
            return value
        return torch.cat([value[-1:], value[1:]])
    if isinstance(value, dict):
        return {key: _exchange(part, n) for key, part in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        parts = [_exchange(part, n) for part in value]
        if len(parts) == n and all(isinstance(p, Tensor) and p.dim() <= 3 for p in parts):
            parts[0] = value[-1]
        return type(value)(parts)
    return value


def _on_cuda(module: nn.Module) -> Iterator[bool]:
    return (parameter.is_cuda for parameter in module.parameters())


def _remember(module: nn.Module) -> Callable[[], None]:
    """Return what puts the buffers and the random state back as they are now."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    state = torch.get_rng_state()
    devices = [torch.cuda.current_device()] if next(_on_cuda(module), False) else []
    cuda = [torch.cuda.get_rng_state(device) for device in devices]

    def undo() -> None:
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        torch.set_rng_state(state)
        for device, one in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(one, device)

    return undo
