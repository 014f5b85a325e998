"""A program's module, executed anew, and its model."""

import contextlib
import copy
import io
import itertools
import linecache
import logging
import os
import pickle
import random
import sys
import types
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.graph.fuzz.observe import View, see_model, see_module
from tests.graph.fuzz.program import Call, Change, Program
from tests.graph.fuzz.tensors import differentiable, images, spread, weights_like

_COUNT = itertools.count()


@dataclass
class Outcome:
    """What an action did in one world: outputs, lines, state, the error that ended it."""

    error: Exception | None = None
    result: Any = None
    state: Any = None
    lines: str = ""
    random: tuple[float, ...] = ()
    tensors: list[Tensor] = field(default_factory=list)
    state_tensors: list[Tensor] = field(default_factory=list)


class _Printing(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print("log:", record.getMessage())


class World:
    """A module of its own, with its own globals, environment and default dtype."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.name = f"fuzz_program_{next(_COUNT)}"
        self.ns = types.ModuleType(self.name)
        self.environ: dict[str, str] = {}
        self.dtype = torch.float32
        sys.modules[self.name] = self.ns
        filename = f"<{self.name}>"
        lines = program.source.splitlines(True)
        linecache.cache[filename] = (len(program.source), None, lines, filename)
        with self.inside():
            exec(compile(program.source, filename, "exec"), vars(self.ns))
            self.original = self.ns.Model().double().eval()
        spread(self.original, 1)
        self.model = self.original

    def close(self) -> None:
        del sys.modules[self.name]
        linecache.cache.pop(f"<{self.name}>", None)

    @contextlib.contextmanager
    def inside(self):
        """Make what is global to a process this world's."""
        os.environ.update(self.environ)
        torch.set_default_dtype(self.dtype)
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        logger, handler = logging.getLogger("fuzz"), _Printing()
        logger.addHandler(handler)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            own = [k for k in os.environ if k.startswith("FUZZ_")]
            self.environ = {k: os.environ.pop(k) for k in own}
            self.dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)

    def run(self, action) -> Outcome:
        """Do something, and look at everything it may have changed."""
        outcome, view, printed = Outcome(), View(), io.StringIO()
        with self.inside(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.redirect_stdout(printed):
                try:
                    result = action()
                    outcome.result = view.of(result)
                    outcome.tensors = list(view.tensors)
                except Exception as error:
                    outcome.error = error
            outcome.random = (float(torch.rand(())), random.random(), float(np.random.rand()))
        messages = [str(w.message) for w in caught if w.category is UserWarning]
        outcome.lines = printed.getvalue() + "".join(f"warned: {m}\n" for m in messages)
        state = View()
        outcome.state = self.see(state)
        outcome.state_tensors = state.tensors
        return outcome

    def see(self, view: View) -> Any:
        return (
            see_module(self.ns, view),
            see_model(self.model, view),
            sorted(self.environ.items()),
        )

    def given(self, call: Call) -> tuple[dict[str, Any], Any]:
        """Return the keyword arguments that hold the labels, and what to put in scope."""
        return {}, contextlib.nullcontext()

    def call(self, action: Call) -> Any:
        """Call the model, and backward in training."""
        self.model.train(action.train)
        self.model.zero_grad()
        x = images(action.batch, action.size)
        given, scope = self.given(action)
        if not action.train:
            with torch.no_grad(), scope:
                return self.evaluate(action.expression, x, given), x
        leaf = x.requires_grad_()
        with scope:
            arguments = leaf * 1.0
            output = self.evaluate(action.expression, arguments, given)
        loss = sum((t * weights_like(t)).sum() for t in differentiable(output))
        if isinstance(loss, Tensor):
            self.backward(loss)
        return output, leaf.grad

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def evaluate(self, expression: str, x: Tensor, given: dict[str, Any], model=None) -> Any:
        scope = {"x": x, "given": given, "ns": self.ns, "model": model or self.model}
        return eval(expression, scope)

    def change(self, action: Change) -> None:
        def each(name: str) -> list[nn.Module]:
            return [
                m
                for m in self.model.modules()
                if name in vars(m)
                or name in m._modules
                or name in m._buffers
                or name in m._parameters
            ]

        scope = {"model": self.model, "ns": self.ns, "each": each, "torch": torch, "nn": nn}
        scope |= {"os": os, "types": types, "functools": __import__("functools")}
        exec(action.code, {**scope, "checkpoint_wrapper": checkpoint_wrapper})

    def copy(self, how: str) -> None:
        model = self.model
        self.model = (
            copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        )
