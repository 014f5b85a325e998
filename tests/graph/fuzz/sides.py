"""The worlds that are compared: originals that hold what one context has, and converted models."""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from normswap.methods.layer import ContextLayer
from tests.graph.fuzz.observe import View, see_model, see_module
from tests.graph.fuzz.program import Call, Program
from tests.graph.fuzz.tensors import images, spread
from tests.graph.fuzz.world import World

NAMES = ("a", "b")
PRIORS = (0.7, 0.3)


class Reference(World):
    """The original, its norms holding what one context has."""

    def __init__(self, program: Program, context: int) -> None:
        super().__init__(program)
        self.model = copy.deepcopy(self.original)
        if program.apart:
            spread(self.model, 10 + context)

    def norms(self) -> list[_BatchNorm]:
        return [m for m in self.model.modules() if isinstance(m, _BatchNorm)]

    def backward(self, loss: Tensor) -> None:
        """Checkpointing updates torch's running statistics twice; the converted model's once."""
        kept = [(b, b.clone()) for norm in self.norms() for b in norm.buffers()]
        loss.backward()
        for buffer, value in kept:
            buffer.copy_(value)


class Pooled(Reference):
    """The original, its norms holding the contexts' pooled statistics and affines."""

    def __init__(self, program: Program, references: Sequence[Reference]) -> None:
        super().__init__(program, 0)
        self.references = references
        self.pool()

    @torch.no_grad()
    def pool(self) -> None:
        for norm, *each in zip(self.norms(), *(r.norms() for r in self.references), strict=True):
            mean = sum(p * n.running_mean for p, n in zip(PRIORS, each, strict=True))
            square = sum(
                p * (n.running_var + n.running_mean**2) for p, n in zip(PRIORS, each, strict=True)
            )
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(square - mean**2)
            norm.weight.copy_(sum(p * n.weight for p, n in zip(PRIORS, each, strict=True)))
            norm.bias.copy_(sum(p * n.bias for p, n in zip(PRIORS, each, strict=True)))


class Converted(World):
    """The converted model."""

    def __init__(self, program: Program, traced: bool, references: list[Reference]) -> None:
        self.traced = traced
        super().__init__(program)
        self.before = self.see_original()
        self.outcome = self.run(self.convert)
        self.rows = list(range(len(NAMES)))
        if self.outcome.error is None:
            self.take(references)

    def see_original(self) -> tuple[Any, list[Tensor]]:
        view = View()
        seen = (see_module(self.ns, view), see_model(self.original, view))
        values = [*view.tensors, *self.original.state_dict().values()]
        return (seen, type(self.original)), [t.detach().clone() for t in values]

    def convert(self) -> None:
        inputs = (images(2, 6),) if self.program.verify else None
        self.model = normswap.convert(
            self.original,
            "cn",
            contexts=list(NAMES),
            priors=list(PRIORS),
            unknown=self.program.unknown,
            example_inputs=inputs,
            trace=self.traced,
        )

    def norms(self) -> list[ContextLayer]:
        return [m for m in self.model.modules() if isinstance(m, ContextLayer)]

    def take(self, references: list[Reference]) -> None:
        """Take the parameters and statistics of the references, a row from each."""
        with torch.no_grad():
            for k, reference in enumerate(references):
                for layer, norm in zip(self.norms(), reference.norms(), strict=True):
                    scale = PRIORS[k] ** 0.5
                    layer.weight[k] = norm.weight * scale
                    layer.bias[k] = norm.bias * scale
                    layer.running_mean[k] = norm.running_mean
                    layer.running_var[k] = norm.running_var

    def given(self, call: Call) -> tuple[dict[str, Any], Any]:
        if not call.labels:
            return {}, contextlib.nullcontext()
        labels: Any = torch.tensor([-1 if k is None else k for k in call.labels])
        if len(call.labels) == 1 and call.labels[0] is not None and call.batch > 1:
            labels = NAMES[call.labels[0]] if call.through == "names" else call.labels[0]
        elif call.through == "names":
            labels = [NAMES[k] for k in call.labels]
        if call.through == "scope":
            return {}, normswap.use_context(self.model, labels)
        name = type(self.model)._normswap_argument
        return {name: labels}, contextlib.nullcontext()
