"""Which sites of a model fire in a forward: one draw for the whole model."""

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from normswap.errors import ConversionError, InputError, NormswapError
from normswap.functional.backend import is_traced
from normswap.functional.draws import is_captured
from normswap.functional.recomputation import in_backward
from normswap.util.arguments import check_count, check_number

REMEMBERED = 4096
# Where CUDA graphs are.
CAPTURES = "cuda"


class Schedule:
    """Draws, once per forward, which of a model's sites fire.

    With probability p, `active` different sites, chosen uniformly, fire; else none does. The model
    calls `begin` where a forward starts in training and `end` where it ends; each site asks
    `fires`. Shared by the sites of one model, and copied and pickled with them.

    In eager mode the draw is made on the CPU and answers are bools, so that a site that does not
    fire costs nothing and no device is waited for. Inside `torch.compile`, and where a CUDA graph
    is captured, it is a tensor of the graph and answers are tensors: each run draws anew.

    A site that asks twice in a draw begins the next one, so that running a part of the model
    without its root does not repeat one draw for ever. A part that is compiled by itself, apart
    from the root, has no state to keep: there each site fires with probability
    ``p * active / num_sites``, whatever the others do.

    Each thread has its own draw: replicas of `DataParallel` share this object.

    Args:
        p: in [0, 1]; probability that a forward has firing sites.
        active: sites that then fire, in [1, num_sites]; the authors' scripts use 1 or 2.
        num_sites: sites of the model, at least 1.

    Raises:
        ConversionError: an argument out of range.

    Source: Tang et al., ICCV 2021, arXiv 2102.02811, section 5, code ``_enable_cross_norm``.
    Differs from source: torch's generator instead of NumPy's; no flag is set on modules, which
    replicas would miss.
    """

    def __init__(self, p: float, active: int, num_sites: int) -> None:
        check_number("p", p, 0, 1)
        check_count("num_sites", num_sites)
        check_count("active", active)
        if active > num_sites:
            raise ConversionError(
                f"expected active= in [1, {num_sites}], the number of sites, got {active}"
            )
        self.p, self.active, self.num_sites = p, active, num_sites
        self._draw = _Draw()
        self._answers: OrderedDict[int, bool | Tensor] = OrderedDict()
        self._flags: Tensor | None = None

    def begin(self, device: torch.device | None = None) -> None:
        """Draw anew, where a forward of the model starts.

        Args:
            device: where the flags of a compiled forward live; pass that of the model's input.
        """
        captured = is_captured() and not in_backward()
        if captured and (device is None or device.type != CAPTURES):
            device = torch.device(CAPTURES)  # the model's first input may be no tensor of a GPU
        if is_traced() or captured:
            drawn = torch.rand(self.num_sites, device=device, dtype=torch.float32)
            rank = drawn.argsort().argsort()
            self._flags = (rank < self.active) & (torch.rand((), device=device) < self.p)
            return
        self._flags = None
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        if not in_backward():
            self._begin(seed)

    def end(self) -> None:
        """Forget the draw, where the forward ends; a site that asks now begins another."""
        self._flags = None
        if not is_traced():
            self._draw.fired = None

    def fires(self, site: int, device: torch.device | None = None) -> bool | Tensor:
        """Return whether a site fires in this forward.

        Args:
            site: in [0, num_sites).
            device: where a tensor answer should be; pass that of the site's input.

        Returns:
            A bool; where `torch.compile` made the draw, a 0-dim bool tensor.

        Raises:
            NormswapError: a recomputation in backward whose forward is not known, or a CUDA graph
                that would repeat one draw.
        """
        if is_traced():
            if self._flags is None:
                return torch.rand((), device=device) < self.p * self.active / self.num_sites
            return self._flags[site].to(device)
        # Gradient checkpointing asks again in backward, with torch's generator as it was then: the
        # same number names the answer, however many forwards lie between.
        ticket = int(torch.randint(2**63 - 1, (), device="cpu"))
        if in_backward():
            if ticket not in self._answers:
                raise NormswapError(
                    "expected gradient checkpointing to run with torch's random state as in "
                    "forward, got a recomputation of a forward that is not known; leave "
                    "preserve_rng_state on, and call backward before the forwards of some hundred "
                    "other batches"
                )
            return self._answers[ticket]
        if self._flags is None:
            answer: bool | Tensor = self._ask(site, ticket)
        else:
            # A graph break: the compiled part of this forward began the draw. Or a CUDA graph is
            # captured, whose memory nothing may keep beside it.
            answer = self._flags[site].to(device)
            if is_captured():
                return answer
        self._answers[ticket] = answer
        if len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)
        return answer

    def _ask(self, site: int, seed: int) -> bool:
        draw = self._draw
        if self.p > 0 and is_captured():
            raise InputError(
                "expected which CrossNorm layers fire to be drawn anew in every step, got a CUDA "
                "graph, whose replays would repeat one draw; capture in eval mode or with p=0, or "
                'use torch.compile(model, mode="reduce-overhead"), which draws on the device'
            )
        if draw.fired is None or site in draw.asked:
            self._begin(seed)
        draw.asked.add(site)
        return draw.fired is not None and site in draw.fired

    def _begin(self, seed: int) -> None:
        # Its own generator: drawing must move torch's by one number, fired or not, or what a
        # checkpointed part draws next would differ in its recomputation.
        generator = torch.Generator().manual_seed(seed)
        fired: list[int] = []
        if torch.rand((), generator=generator, device="cpu").item() < self.p:
            order = torch.randperm(self.num_sites, generator=generator, device="cpu")
            fired = order[: self.active].tolist()
        self._draw.fired = frozenset(fired)
        self._draw.asked = set()

    # Copies and pickles start without a draw.
    def __getstate__(self) -> dict[str, Any]:
        return {"p": self.p, "active": self.active, "num_sites": self.num_sites}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state)

    def __repr__(self) -> str:
        return f"Schedule(p={self.p}, active={self.active}, num_sites={self.num_sites})"


class _Draw(threading.local):
    """The draw of one thread: the sites that fire, and those that asked."""

    fired: frozenset[int] | None = None
    asked: set[int]
