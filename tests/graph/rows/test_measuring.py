"""Measuring which row belongs to which sample leaves no mark on the model."""

import copy
import functools
import random
from contextvars import ContextVar
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import normswap
from tests.support.rows import (
    LABELS,
    ORDERS,
    Folding,
    K,
    N,
    Rows,
    TwoViews,
    apart,
    check,
    converted,
    from_innermost,
    from_outermost,
    innermost,
    ordered,
    outermost,
    own,
    rows_of,
    singly,
)


def test_measuring_updates_statistics_once_and_draws_nothing():
    model = converted(innermost, from_innermost).train()
    reference = copy.deepcopy(model)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    states = torch.get_rng_state(), random.getstate()
    y = model(x, context=LABELS)
    assert torch.get_rng_state().equal(states[0])
    assert random.getstate() == states[1]
    tokens = reference.first(x.transpose(1, 2), context=LABELS).transpose(1, 2)
    expected = reference.norm(innermost(tokens), context=LABELS.repeat(5))
    assert y.equal(from_innermost(expected, N))
    for (name, a), (_, b) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert a.equal(b), name
    assert all(m.training for m in model.modules())


def test_what_a_forward_changes_changes_once():
    model = normswap.convert(TwoViews().double(), "cn", contexts=K).train()
    x = torch.randn(N, 6, dtype=torch.float64)
    model(x, context=LABELS)
    assert model.calls == 1
    assert torch.allclose(model.average, x.mean(0))
    assert model.norm.num_batches_tracked.tolist() == [1, 1, 1]


def test_verification_leaves_no_trace_in_the_original():
    original = TwoViews()
    normswap.convert(original, "cn", contexts=K, example_inputs=torch.randn(2, 6))
    assert original.calls == 0
    assert original.average.equal(torch.zeros(6))


def test_hooks_of_the_user_run_once_a_call_and_modes_and_flags_stay():
    model = ordered(ORDERS["pairs"]).train()
    calls, of_all = [], []

    def note(m, args, y):
        of_all.append(y)

    class Tool:
        def __init__(self):
            self.seen = []

        def note(self, m, args, y):
            self.seen.append(y)

    tool = Tool()
    on_all = (note, lambda m, args, y: of_all.append(y), tool.note)
    hooks = [register_module_forward_hook(f) for f in on_all]
    for module in (model, model.linear, model.norm):
        module.register_forward_pre_hook(lambda m, args: calls.append("before"))
        module.register_forward_hook(lambda m, args, y: calls.append("after"))
    model(torch.randn(N, 6, dtype=torch.float64), context=LABELS)
    for hook in hooks:
        hook.remove()
    assert len(of_all) == 2 * 3
    assert len(tool.seen) == 3
    assert calls.count("before") == calls.count("after") == 3
    assert len(model.linear._forward_hooks) == len(model.linear._forward_pre_hooks) == 1


@pytest.mark.parametrize("trace", [True, False])
def test_what_counts_or_keeps_operations_sees_those_of_the_call_alone(trace):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        return normswap.convert(model, "cn", contexts=K, verify=False, trace=trace)

    x = torch.randn(N, 6)
    with FlopCounterMode(display=False) as counter:
        build()(x, context=LABELS)
    assert counter.get_total_flops() == 2 * N * 6 * 6
    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    model, plain = build(), build()
    y = checkpoint(model, x, context=LABELS, use_reentrant=False, context_fn=keep)
    for output in (y, plain(x, context=LABELS)):
        output.square().sum().backward()
    assert torch.allclose(model[0].weight.grad, plain[0].weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("when", ["before", "after", "measured before"])
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "partial", "either"])
def test_hooks_that_put_samples_in_another_order_are_measured(kind, when, trace):
    def register(module):
        if kind == "pre-hook":
            return module.register_forward_pre_hook(lambda m, args: (args[0].flip(0),))
        if kind == "either":
            hook = lambda m, args, y: y.flip(0) if len(y) > 1 else None  # noqa: E731
            return module.register_forward_hook(hook)
        turn = lambda axis, m, args, y: y.flip(axis)  # noqa: E731
        hook = functools.partial(turn, 0) if kind == "partial" else lambda m, args, y: y.flip(0)
        return module.register_forward_hook(hook)

    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    x = torch.randn(N, 6)
    if when == "before":
        register(model[0])
    model = apart(normswap.convert(model, "cn", contexts=K, verify=False, trace=trace))
    if when == "measured before":
        assert torch.allclose(model(x, context=LABELS), singly(model, x), atol=1e-6)
    if when != "before":
        register(model[0])
    assert torch.allclose(model(x, context=LABELS), singly(model, x).flip(0), atol=1e-6)
    assert when == "measured before" or "permuted" in rows_of(model)["1"]


def test_weights_that_a_hook_of_torch_computes_are_computed():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6)), nn.BatchNorm1d(6)).eval()

    model = apart(normswap.convert(build(), "cn", contexts=K, verify=False))
    x = torch.randn(N, 6)
    assert torch.allclose(model(x, context=LABELS), singly(model, x), atol=1e-6)
    assert rows_of(model) == {"1": "one per sample"}


def test_norms_with_children_are_in_eval_while_a_model_is_measured():
    timm = pytest.importorskip("timm")

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model("test_efficientnet", num_classes=3)

        def forward(self, x):
            one, two = self.body(torch.cat([x, 2 * x])).chunk(2)
            return one * two

    model = normswap.convert(Siamese(), "cn", contexts=K, verify=False).train()
    model(torch.randn(N, 3, 32, 32), context=LABELS)
    assert set(rows_of(model).values()) == {"repeated x2"}
    assert all(module.training for module in model.modules())


def test_a_norm_that_was_left_out_is_in_eval_too():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = normswap.convert(model, "cn", contexts=K, exclude="0", verify=False).train()
    model(torch.randn(N, 6), context=LABELS)
    assert rows_of(model) == {"0": "", "2": "one per sample"}
    assert model[0].num_batches_tracked == 1


def test_rows_are_measured_at_conversion_where_there_are_inputs():
    model = Folding(innermost, from_innermost)
    x = torch.randn(2, 5, 6)
    model = normswap.convert(model, "cn", contexts=K, example_inputs=x)
    assert rows_of(model) == {"first": "one per sample", "norm": "repeated x5"}
    assert "repeated x5" in str(normswap.summary(model))


def test_verification_measures_rows():
    original = Folding(outermost, from_outermost)
    model = normswap.convert(original, "cn", contexts=K)
    assert set(rows_of(model).values()) == {
        "not measured: no batch of several contexts has reached it"
    }
    normswap.verify(model, original, torch.randn(2, 5, 6))
    assert rows_of(model) == {"first": "one per sample", "norm": "folded x5"}


class Beside(nn.Module):
    """Holds a norm that its forward runs in training only, or not at all."""

    def __init__(self, always):
        super().__init__()
        self.first, self.other = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.always = always

    def forward(self, x):
        print("", end="")
        x = self.first(x) if self.always or self.training else x
        return self.other(x) if self.training else x


@pytest.mark.parametrize("always", [False, True])
def test_a_norm_that_no_call_has_reached_is_called_so(always):
    model = normswap.convert(
        Beside(always).eval(), "cn", contexts=K, example_inputs=torch.randn(5, 6)
    )
    unmet = "not measured: no batch of several contexts has reached it"
    assert rows_of(model) == {"first": "one per sample" if always else unmet, "other": unmet}
    model.train()(torch.randn(4, 6), context=torch.tensor([0, 1, 1, 0]))
    assert set(rows_of(model).values()) == {"one per sample"}


def test_threads_do_not_mix_what_they_measure():
    from concurrent.futures import ThreadPoolExecutor

    model = ordered(ORDERS["pairs"])
    batches = [torch.randn(n, 6, dtype=torch.float64) for n in (2, 3, 4, 5) * 6]

    def run(x):
        labels = torch.arange(len(x)) % K
        with torch.no_grad():
            return torch.allclose(model(x, context=labels), singly(model, x, labels))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, batches))
    assert rows_of(model) == {"norm": "repeated x2"}


def test_noise_drawn_from_a_generator_of_the_model_is_drawn_once():
    model, reference = own(False, 0), torch.Generator().manual_seed(0)
    model(torch.randn(N, 6), context=LABELS)
    torch.rand(N, 6, generator=reference)
    assert torch.equal(model.generator.get_state(), reference.get_state())
    assert rows_of(model) == {"norm": "one per sample"}


def test_a_first_call_under_checkpointing_saves_for_backward_what_it_would():
    from torch.utils.checkpoint import checkpoint

    model = ordered(ORDERS["pairs"])
    x = torch.randn(N, 6, dtype=torch.float64, requires_grad=True)
    y = checkpoint(lambda x: model(x, context=LABELS), x, use_reentrant=False)
    (found,) = torch.autograd.grad(y.sin().sum(), x)
    (expected,) = torch.autograd.grad(model(x, context=LABELS).sin().sum(), x)
    assert torch.allclose(found, expected)


class Registry(dict):
    """Stores under another key than it is given, as that of transformers does."""

    def __setitem__(self, key, value):
        super().__setitem__(f"<{key}>", value)


REGISTRY = Registry()
REGISTRY["known"] = 2.0


class Looking(Rows):
    sizes: ClassVar = list[int]

    def forward(self, x):
        return super().forward(x) * REGISTRY["<known>"]


def test_what_a_forward_looks_up_stays_and_may_name_a_generic_type():
    model = normswap.convert(
        Looking(lambda s, x: s.norm(s.linear(x))).double().eval(), "cn", contexts=K, verify=False
    )
    check(apart(model))
    assert rows_of(model) == {"norm": "one per sample"}
    assert REGISTRY == {"<known>": 2.0}


def test_a_context_variable_that_a_forward_sets_is_as_after_one_run():
    calls = ContextVar("calls", default=0)

    class Counting(Rows):
        def forward(self, x):
            calls.set(calls.get() + 1)
            return super().forward(x)

    model = normswap.convert(Counting(ORDERS["as they are"]).eval(), "cn", contexts=K, verify=False)
    before = calls.get()
    model(torch.randn(N, 6), context=LABELS)
    assert calls.get() == before + 1
