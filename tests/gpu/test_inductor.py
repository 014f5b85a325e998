"""Compiled by Inductor for the device, into one graph: the same numbers as eager."""

import copy

import pytest
import torch

from normswap.testing.case import MIXED
from normswap.testing.models import make_inputs
from tests.gpu.steps import EVERY, TRAINING, case_of, require_near, values_of

pytestmark = pytest.mark.gpu


@TRAINING
@EVERY
def test_a_compiled_model_computes_the_same(method, training, device):
    case = case_of(method)
    model = case.trained().to(device, torch.float32)
    x = make_inputs(model, 12).to(device)
    labels = MIXED.repeat(2).to(device) if case.labelled else None
    values_of(model, x, labels, training)  # measures which rows are whose
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    # A rehearsal does without the minutes that Inductor's C++ takes.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    run = torch.compile(twin, fullgraph=True, backend=backend)
    found = values_of(twin, x, labels, training, compiled=run)
    if training and case.method.stochastic:  # compiled code draws otherwise
        assert all(value.isfinite().all() for value in found.values())
        return
    require_near(found, values_of(model, x, labels, training), 1e-4)
