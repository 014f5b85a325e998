"""How the rows a norm sees follow from the samples, where a model folds more into the batch.

With r rows a sample, windows and tokens are usually folded with the samples outermost (sample 0
has the first r rows); concatenated inputs and time-major folds have them innermost (sample 0 has
every N-th row). Which it is cannot be seen from a shape. So a norm that meets folded rows for the
first time has the model's call run twice more, without gradients, once with noise in place of
sample 0: the rows that change are its rows.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ContextError
from normswap.util.restore_state import remember

_OUTER, _INNER, _MIXED = "samples outermost", "samples innermost", "mixed"
Call = Callable[[Any], Any]


class Rows:
    """What a converted model knows of the layout of its norms' rows, by norm and rows a sample."""

    def __init__(self) -> None:
        self.layouts: dict[tuple[str, int], str] = {}
        self.entry: tuple[nn.Module, Call, Any] | None = None
        self.seen: dict[str, list[Tensor]] | None = None

    def innermost(self, site: str, x: Tensor, samples: int) -> bool:
        """Return whether the samples are innermost in the rows of x, given at a norm.

        Raises:
            ContextError: the rows are neither, or nothing tells which; labels cannot follow them.
        """
        if self.seen is not None:
            self.seen.setdefault(site, []).append(x.detach().reshape(x.shape[0], -1).clone())
            return False
        # In a program for any batch the sizes are symbols; their ratio is a number all the same.
        key = (site, int(x.shape[0] // samples))
        layout = self.layouts.get(key)
        if layout is None and self.entry is not None and not torch.compiler.is_compiling():
            self._learn(*self.entry, samples)
            layout = self.layouts.get(key)
        if layout is None and torch.compiler.is_compiling():
            # Nothing can be run here to find out; what models fold is mostly windows and tokens.
            return False
        if layout in (_INNER, _OUTER):
            return layout == _INNER
        found = "in another order" if layout == _MIXED else "whose order nothing tells yet"
        raise ContextError(
            f"expected the rows of the input of {site} to be the samples in order, each r times "
            f"or all r times over, got {x.shape[0]} rows of {samples} samples {found}, so that "
            "labels cannot follow; call the whole model on samples that differ, or leave the norm "
            "out with exclude="
        )

    def run(self, module: nn.Module, call: Call, values: Any) -> Any:
        """Run the outermost call of a model, within reach of the norms below."""
        if self.entry is not None or self.seen is not None:
            return call(values)
        self.entry = (module, call, values)
        try:
            return call(values)
        finally:
            self.entry = None

    def _learn(self, module: nn.Module, call: Call, values: Any, samples: int) -> None:
        # Norms and dropout must treat samples apart, so leaves are in eval; containers keep their
        # mode, since what they fold may depend on it.
        modes = [(m, m.training) for m in module.modules() if next(m.children(), None) is None]
        undo = remember(module)
        runs = []
        try:
            for leaf, _ in modes:
                leaf.__dict__["training"] = False
            for noise in (False, True):
                self.seen = {}
                inputs = tuple(_prepare(value, samples, noise) for value in values)
                undo()
                with torch.no_grad():
                    call(inputs)
                runs.append(self.seen)
        finally:
            self.seen = None
            for leaf, mode in modes:
                leaf.__dict__["training"] = mode
            undo()
        for site, calls in runs[0].items():
            found: dict[int, set[str]] = {}
            others = runs[1].get(site, [])
            for one, other in zip(calls, others, strict=False):
                found.setdefault(one.shape[0] // samples, set()).update(
                    _decide(one, other, samples)
                )
            for repeats, layouts in found.items():
                if layouts and len(calls) == len(others):
                    self.layouts[site, repeats] = layouts.pop() if len(layouts) == 1 else _MIXED

    def __getstate__(self) -> dict[str, Any]:
        """Copies know the layouts; no run is under way in them."""
        return {"layouts": dict(self.layouts)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore."""
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)


def _decide(one: Tensor, other: Tensor, samples: int) -> set[str]:
    """Return the layout that explains which rows changed; nothing where several do."""
    if one.shape != other.shape:
        return {_MIXED}
    repeats = one.shape[0] // samples
    scale = one.nan_to_num().abs().amax(1, keepdim=True)
    # Rounding may differ between the runs, so small differences count where there are no others.
    for tolerance in (1e-5, 16 * torch.finfo(one.dtype).eps):
        close = ((one - other).abs() <= tolerance * scale) | (one == other)
        close |= one.isnan() & other.isnan()
        changed = (~close.all(1)).nonzero().flatten().tolist()
        outer = all(row < repeats for row in changed)
        inner = all(row % samples == 0 for row in changed)
        if not (outer and inner):
            return {_OUTER if outer else _INNER if inner else _MIXED}
    return set()


def _prepare(value: Any, samples: int, noise: bool) -> Any:
    """Copy an argument; put noise, or another sample, in place of its first sample."""
    if isinstance(value, Tensor):
        value = value.detach().clone()
        if noise and value.dim() and value.shape[0] == samples:
            value[0] = _noise(value)
        return value
    if isinstance(value, dict):
        parts = {key: _prepare(part, samples, noise) for key, part in value.items()}
        return parts if type(value) is dict else type(value)(parts)
    if isinstance(value, (list, tuple)):
        items = [_prepare(part, samples, noise) for part in value]
        images = all(isinstance(part, Tensor) and part.dim() <= 3 for part in items)
        if noise and len(items) == samples and images:
            items[0] = _noise(items[0].unsqueeze(0))
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return replace(value, **{k: _prepare(v, samples, noise) for k, v in changes.items()})
    return value


def _noise(batch: Tensor) -> Tensor:
    """Return something like a sample of a batch, and unlike its first."""
    if not batch.is_floating_point():
        return batch[-1]
    finite = batch.nan_to_num(0.0, 0.0, 0.0)
    spread = finite.std(correction=0)
    return finite.mean() + torch.randn_like(batch[0]) * torch.where(spread > 0, spread, 1.0)
