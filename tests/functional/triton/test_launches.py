"""How many kernels a layer starts, Triton's and torch's: counted where none runs."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import normswap
from normswap.functional import backend
from normswap.functional.labels import resolve_labels

jit = pytest.importorskip("triton.runtime.jit")
# What starts no kernel.
FREE = {
    *("view", "_unsafe_view", "detach", "alias", "expand", "unsqueeze", "squeeze", "select"),
    *(
        "slice",
        "split",
        "split_with_sizes",
        "unbind",
        "empty",
        "empty_like",
        "new_empty",
        "as_strided",
        "t",
    ),
}
NAMES = tuple("abcd")


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.started = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name not in FREE:
            self.started.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def counter(monkeypatch):
    """Have kernels do nothing but count, as if a CPU were a GPU whose labels the host can't see."""
    monkeypatch.setattr(backend, "DEVICES", ("cpu",))
    found = Counter()

    def start(kernel, *args, grid, warmup, **settings):
        found.started.append(kernel.__name__)

    backend._works.cache_clear()
    with mock.patch.object(jit.JITFunction, "run", start):
        yield found
    backend._works.cache_clear()


def batch():
    x = torch.randn(8, 16, 6, 6).to(torch.bfloat16, memory_format=torch.channels_last)
    labels = resolve_labels(torch.randint(0, 4, (8,)), 4, NAMES)
    return x.requires_grad_(), labels._replace(unknown=None)


def count(counter, layer, x, *labels):
    """Return how many kernels forward and backward start, once the labels are sorted."""
    layer(x, *labels)
    counter.started.clear()
    with counter:
        y = layer(x, *labels)
    forward = list(counter.started)
    counter.started.clear()
    if y.requires_grad:
        dy = torch.ones_like(y)
        with counter:
            torch.autograd.grad(y, [x, *layer.parameters()], dy)
    return forward, list(counter.started)


def test_cn(counter):
    layer, (x, labels) = normswap.ContextNorm(16, 4, unknown="pooled"), batch()
    forward, backward = count(counter, layer.train(), x, labels)
    assert forward == ["stats", "tables", "apply_and_move"]
    assert backward == ["dots", "gradients", "combine"]
    layer.stats_frozen = True
    forward, backward = count(counter, layer, x, labels)
    assert forward == ["tables", "apply"]
    assert backward == ["dots", "gradients"]
    with torch.no_grad():
        for given in (labels, None):
            assert count(counter, layer.eval(), x, given)[0] == ["tables", "apply"]


def test_cnx(counter):
    layer, (x, labels) = normswap.ContextNormX(16, 4), batch()
    layer.fresh = False
    for training in (True, False):
        forward, backward = count(counter, layer.train(training), x, labels)
        assert forward == ["tables", "apply"]
        assert backward == ["dots", "gradients"]
    with torch.no_grad():
        for given in (labels, None):
            assert count(counter, layer, x, given)[0] == ["tables", "apply"]


def test_labels_are_sorted_once_for_all_layers(counter):
    layers = torch.nn.ModuleList(normswap.ContextNorm(16, 4, unknown="pooled") for _ in range(3))
    layers[0](*batch())
    x, labels = batch()
    counter.started.clear()
    with counter:
        for layer in layers:
            layer(x, labels)
    assert counter.started.count("sort") == 1
    assert len(counter.started) == 3 * 3 + 4


def test_cn_whose_unlabelled_samples_weigh_the_contexts(counter):
    layer, (x, labels) = normswap.ContextNorm(16, 4, unknown="posterior"), batch()
    forward, backward = count(counter, layer.train(), x, labels)
    assert forward == ["stats", "tables", "apply_and_move"]
    assert backward == ["dots", "gradients", "combine"]
    forward, backward = count(counter, layer.eval(), x, labels)
    assert forward == ["stats", "tables", "apply"]
    assert backward == ["dots", "gradients", "combine"]
    with torch.no_grad():
        for given in (labels, None):
            assert count(counter, layer, x, given)[0] == ["stats", "tables", "apply"]
        known = labels._replace(unknown=False)
        assert count(counter, layer, x, known)[0] == ["tables", "apply"]


def test_cnx_whose_unlabelled_samples_weigh_the_contexts(counter):
    layer, (x, labels) = normswap.ContextNormX(16, 4, unknown="posterior"), batch()
    layer.fresh = False
    for training in (True, False):
        forward, backward = count(counter, layer.train(training), x, labels)
        assert forward == ["stats", "tables", "apply"]
        assert backward == ["dots", "weight_gradients", "gradients", "combine"]
    with torch.no_grad():
        for given in (labels, None):
            assert count(counter, layer, x, given)[0] == ["stats", "tables", "apply"]
        known = labels._replace(unknown=False)
        assert count(counter, layer, x, known)[0] == ["tables", "apply"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("maker", [normswap.ContextNorm, normswap.ContextNormX])
def test_more_contexts_than_kernels_weigh_are_left_to_the_formulas(counter, training, maker):
    layer, (x, labels) = maker(16, 65, unknown="posterior").train(training), batch()
    layer.fresh = False
    with torch.no_grad():
        found = count(counter, layer, x, labels)[0]
        assert "tables" not in found
        assert "apply" in found
        assert "tables" in count(counter, layer, x, labels._replace(unknown=False))[0]


def test_cnx_on_batch_statistics_is_a_batch_norm_and_the_kernels_of_cnx(counter):
    layer, (x, labels) = normswap.BatchContextNormX(16, 4), batch()
    forward, backward = count(counter, layer.train(), x, labels)
    moved = ["add_", "lerp_", "lerp_"]
    assert forward == ["new_zeros", "native_batch_norm", *moved, "tables", "apply"]
    assert backward == ["dots", "gradients", "native_batch_norm_backward"]
    with torch.no_grad():
        found = count(counter, layer.eval(), x, labels)[0]
    assert found == ["native_batch_norm", "tables", "apply"]


# Forward and backward of training, and evaluation: what no kernels serve, so that it grows no more.
BY_OPERATORS = {
    "shrink": (lambda: normswap.ContextNorm(16, 4, shrink=4.0), (159, 139, 3)),
    "more contexts than kernels weigh": (lambda: normswap.ContextNorm(16, 65), (137, 103, 68)),
    "each position": (
        lambda: normswap.AdaptiveContextNorm(16, 4, assignment="position"),
        (99, 144, 59),
    ),
}


@pytest.mark.parametrize("name", BY_OPERATORS)
def test_what_torchs_operators_start_where_no_kernels_serve(counter, name):
    make, most = BY_OPERATORS[name]
    layer, (x, labels) = make().train(), batch()
    given = () if isinstance(layer, normswap.AdaptiveContextNorm) else (labels,)
    found = [len(kinds) for kinds in count(counter, layer, x, *given)]
    with torch.no_grad():
        found.append(len(count(counter, layer.eval(), x, *given)[0]))
    assert all(a <= b for a, b in zip(found, most, strict=True)), found
