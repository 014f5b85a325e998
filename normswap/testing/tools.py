"""Checks of converted models under copies, torch.compile, torch.export, torch.func, processes."""

import copy
import io
import os
import pickle
import socket
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from normswap.api import plan
from normswap.graph.state import state_of
from normswap.lifecycle.record import method_layers
from normswap.lifecycle.sync_batchnorm import convert_sync_batchnorm
from normswap.testing.case import (
    LABELS,
    MIXED,
    Case,
    Labels,
    backward,
    check,
    move,
    replaces,
    require,
    require_close,
    require_equal,
)
from normswap.testing.models import make_inputs, make_model


@check()
def check_copies_and_pickles(case: Case) -> None:
    """Copies and pickles compute the same, are of the same class and share nothing."""
    for where, model, x in case.each_trained():
        expected = case.in_eval(model, x, case.mixed)
        pickled = pickle.loads(pickle.dumps(model))
        for twin, what in ((copy.deepcopy(model), "copy"), (pickled, "pickle")):
            require(type(twin) is type(model), f"{where}: {what} is of another class")
            require_equal(case.in_eval(twin, x, case.mixed), expected, f"{where}: {what}")
            shared = {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
            require(not shared, f"{where}: {what} shares {len(shared)} modules")
            move(twin, seed=99)
            found = case.in_eval(model, x, case.mixed)
            require_equal(found, expected, f"{where} after its {what}")


@check(scheduled=True)
def check_copies_have_a_schedule_of_their_own(case: Case) -> None:
    """The layers of a copy share one schedule, which is not the original's."""
    model = case.trained()
    twin = copy.deepcopy(model)
    own, other = (
        {id(m.schedule) for m in root.modules() if hasattr(m, "schedule")} for root in (model, twin)
    )
    require(len(own) == len(other) == 1, f"{len(own)} and {len(other)} schedules")
    require(own != other, "a copy shares the schedule of the original")
    state: Any = state_of(twin)
    require({id(state.schedule)} == other, "the copy begins another schedule than its layers have")


@check()
def check_state_dict_goes_round(case: Case) -> None:
    """A state dict, saved and loaded into a fresh conversion, computes the same to the bit."""
    model, file = case.trained(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = case.convert(make_model(dtype=torch.float64))
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = make_inputs(model)
    for label in case.labels:
        found = case.in_eval(twin, x, label)
        require_equal(found, case.in_eval(model, x, label), f"context {label}")


@check(keeps_function=True)
def check_a_checkpoint_of_the_original_loads(case: Case) -> None:
    """A state dict of the original loads, and gives back its function where norms were replaced."""
    base = make_model(dtype=torch.float64)
    # What an inserted layer learned stays: the original knows nothing of it.
    model = case.trained() if replaces(case.method) else case.convert(base)
    model.load_state_dict(base.state_dict())
    x = make_inputs(base)
    for label in case.labels:
        require_close(case.in_eval(model, x, label), base(x), f"context {label}")


@check()
def check_compiles_into_one_graph(case: Case) -> None:
    """`torch.compile` takes it with ``fullgraph=True``, in training too, and computes the same.

    What is drawn is compared with no other run, as compiled code may draw otherwise; it has to be
    drawn anew in each call.
    """
    name = "Windows" if case.labelled else "Volume"
    name = name if name in case.models else "ConvNet"
    # Whether forwards are the model's own changes nothing of what a mode has a layer do.
    ways = [(True, False), *((trace, True) for trace in case.traces)]
    for trace, training in ways:
        torch._dynamo.reset()
        model = case.trained(name, trace=trace).train(training)
        x, labels = make_inputs(model), case.mixed
        case.run(model, x, labels)  # measures which rows are whose
        twin = copy.deepcopy(model)
        # Own forwards call the same operators as graphs do, and those of eval mode are exported.
        backend = "aot_eager" if trace and training else "eager"
        compiled: Any = torch.compile(twin, fullgraph=True, backend=backend)
        found = case.run(compiled, x, labels)
        backward(found)
        require(bool(found.isfinite().all()), "outputs are not finite")
        where = f"trace={trace}, training={training}"
        if training and case.method.stochastic:
            _require_draws(case, compiled, x, labels, where)
            continue
        require_close(found, case.run(model, x, labels), where)
        if labels is not None:
            flipped = case.run(compiled, x, labels.flip(0))
            require_close(flipped, case.run(model, x, labels.flip(0)), f"{where}, flipped")
        for (key, one), other in zip(model.named_buffers(), twin.buffers(), strict=True):
            require_close(other, one, f"{where}: {key}")


def _require_draws(case: Case, compiled: Any, x: Tensor, labels: Labels, where: str) -> None:
    outputs = []
    for seed in (0, 0, *range(1, 8)):
        torch.manual_seed(seed)
        outputs.append(case.run(compiled, x, labels))
    first, again, *others = outputs
    require_equal(again, first, f"{where}: a seed used twice")
    drawn = any(not torch.equal(y, first) for y in others)
    require(drawn, f"{where}: the same output for each of {len(others) + 1} seeds")


@check()
def check_exports(case: Case) -> None:
    """`torch.export` takes it in eval mode, with the context as an input."""
    name = "Windows" if case.labelled else "ConvNet"
    settings = [{"unknown": u} for u in ("pooled", "posterior")] if case.labelled else [{}]
    # What an own forward calls is what a graph does, whatever is unknown.
    ways = [(True, setting) for setting in settings] + [(False, settings[0])] * case.labelled
    for trace, setting in ways:
        model = case.trained(name, trace=trace, **setting).eval()
        x = make_inputs(model)
        case.run(model, x, case.mixed)  # measures which rows are whose
        program = torch.export.export(model, (x,), case.given(MIXED)).module()
        for labels in (MIXED, MIXED.flip(0)) if case.labelled else [None]:
            expected = case.run(model, x, labels)
            require_close(case.run(program, x, labels), expected, f"{setting}, trace={trace}")


@check()
def check_functional_transforms(case: Case) -> None:
    """`torch.func` sees the function that autograd does: a sample's gradients, a training step."""
    model = case.trained()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = make_inputs(model)
    labels = MIXED if case.labelled else torch.zeros(len(x))

    def call(parameters: Any, buffers: Any, x: Any, label: Any) -> Any:
        given = case.given(label)
        y = functional_call(model, (parameters, buffers), (x,), given)
        return y.square().sum(), buffers

    def loss(parameters: Any, x: Any, label: Any) -> Any:
        return call(parameters, dict(model.named_buffers()), x.unsqueeze(0), label.unsqueeze(0))[0]

    each = vmap(grad(loss), (None, 0, 0))(parameters, x, labels)
    for n in range(len(x)):
        model.zero_grad()
        label = labels[n : n + 1] if case.labelled else None
        backward(case.run(model, x[n : n + 1], label))
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            require_close(each[name][n], expected, f"sample {n}: gradient of {name}", 1e-9)
    model.zero_grad()
    model.train()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(0)
    found, moved = grad(call, has_aux=True)(parameters, buffers, x, labels)
    torch.manual_seed(0)
    backward(case.run(model, x, labels if case.labelled else None))
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        require_close(found[name], expected, f"training: gradient of {name}", 1e-9)
    for name, buffer in model.named_buffers():
        require_close(moved[name], buffer, f"training: {name}", 1e-9)


@check()
def check_plan_needs_no_values(case: Case) -> None:
    """`normswap.plan` takes a model without values (meta device)."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    given: dict[str, Any] = {"contexts": 3} if case.labelled else {}
    if not case.refusal(model):
        rows = plan(model, case.method.name, **given, **dict(case.options)).rows
        require(any(row.action in ("replaced", "inserted") for row in rows), "nothing planned")


def _step(case: Case, model: nn.Module, rows: slice) -> dict[str, Any]:
    model.eval()
    for layer in method_layers(model).values():
        layer.train()
    x, labels = make_inputs(model)[rows], LABELS[rows] if case.labelled else None
    y = case.run(model, x, labels)
    backward(y)
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "grads": grads, "buffers": dict(model.named_buffers())}


def _work(rank: int, folder: str, data: bytes) -> None:
    torch.set_num_threads(1)
    distributed: Any = torch.distributed
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    store: Any = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    case, model = pickle.loads(data)
    torch.save(_step(case, model, (slice(0, 4), slice(4, 6))[rank]), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@check(stochastic=False)
def check_synchronised(case: Case) -> None:
    """Two processes with batches of unequal size train as one process with both batches does."""
    model = convert_sync_batchnorm(case.trained(), others=False)
    if not any(hasattr(m, "synced") for m in model.modules()):
        return
    data = pickle.dumps((case, model))
    whole = _step(case, model, slice(None))
    processes: Any = torch.multiprocessing
    with tempfile.TemporaryDirectory() as folder:
        # A fork server imports the modules it was told to preload once for all processes.
        server = "forkserver" in processes.get_all_start_methods()
        method = "forkserver" if server else "spawn"
        processes.start_processes(_work, (folder, data), nprocs=2, start_method=method)
        paths = [Path(folder) / f"{rank}.pt" for rank in range(2)]
        parts = [torch.load(path, weights_only=False) for path in paths]
    require_close(torch.cat([part["y"] for part in parts]), whole["y"], "outputs")
    for name, expected in whole["grads"].items():
        if expected is not None:
            total = sum(part["grads"][name] for part in parts)
            require_close(total, expected, f"gradient of {name}", 1e-9)
    for part in parts:
        for name, buffer in whole["buffers"].items():
            require_close(part["buffers"][name], buffer, name, 1e-9)
