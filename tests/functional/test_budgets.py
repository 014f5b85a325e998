"""What a layer starts, counted: no time depends on how busy a machine is, these numbers neither."""

import pytest
import torch

import normswap
from normswap.functional.labels import resolve_labels
from tests.support.launches import cost_of, fake_cuda, move, remembered

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.9"), reason="aborts on fake tensors of a GPU that is not there"
)
CN, CNX = normswap.ContextNorm, normswap.ContextNormX
LAYERS = {
    "cn": (lambda: CN(64, 4), False),
    "cn, perhaps -1": (lambda: CN(64, 4, unknown="pooled"), None),
    "cn-x": (lambda: CNX(64, 4), False),
    "cn-x, perhaps -1": (lambda: CNX(64, 4, unknown="pooled"), None),
    "selfnorm": (lambda: normswap.SelfNorm(64), None),
    "crossnorm": (lambda: normswap.CrossNorm(p=1.0), None),
    "acn, by instance": (lambda: normswap.AdaptiveContextNorm(64, 4, assignment="instance"), None),
    "acn": (lambda: normswap.AdaptiveContextNorm(64, 4), None),
}
# Launches of forward, backward and evaluation; passes over x of forward and backward, for float32
# contiguous and bfloat16 with channels last. Lower them where a change allows it.
BUDGETS = {
    "cn": ((38, 21, 10, 3, 7), (39, 23, 10, 4, 14)),
    "cn, perhaps -1": ((71, 31, 40, 3, 7), (72, 33, 40, 4, 14)),
    "cn-x": ((7, 19, 7, 2, 3), (7, 22, 7, 2, 9)),
    "cn-x, perhaps -1": ((35, 66, 35, 2, 3), (35, 69, 35, 2, 9)),
    "selfnorm": ((21, 28, 19, 3, 7), (22, 30, 20, 4, 14)),
    "crossnorm": ((13, 14, 0, 3, 7), (14, 16, 0, 4, 14)),
    "acn, by instance": ((67, 68, 39, 3, 7), (68, 70, 40, 4, 14)),
    "acn": ((65, 104, 36, 113, 218), (67, 107, 38, 227, 438)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("usual", [False, True], ids=["float32", "bfloat16 channels last"])
def test_a_layer_starts_no_more_on_a_device_and_passes_over_x_no_more(kind, usual, monkeypatch):
    make, unknown = LAYERS[kind]
    layer = make()
    layer.fresh = False
    with fake_cuda(monkeypatch):
        dtype = torch.bfloat16 if usual else torch.float32
        layout = torch.channels_last if usual else torch.contiguous_format
        x = torch.empty(32, 64, 14, 14, device="cuda", dtype=dtype, memory_format=layout)
        given = ()
        if kind.startswith("cn"):
            given = (remembered(unknown, len(x)),)
        costs = cost_of(move(layer), x.requires_grad_(), *given)
    found = (*(c.launches for c in costs), *(c.passes for c in costs[:2]))
    budget = BUDGETS[kind][usual]
    assert all(a <= b for a, b in zip(found, budget, strict=True)), (found, budget)


# Operators besides views on the CPU, for float32 contiguous: forward, backward, evaluation.
OPERATORS = {
    "cn": (32, 18, 11),
    "cn, perhaps -1": (71, 28, 41),
    "cn-x": (8, 15, 8),
    "cn-x, perhaps -1": (36, 60, 36),
    "selfnorm": (28, 29, 26),
    "crossnorm": (21, 15, 0),
    "acn, by instance": (75, 69, 47),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_layer_starts_no_more_operators_on_the_cpu(kind):
    make, unknown = LAYERS[kind]
    layer, x = make(), torch.randn(8, 64, 4, 4).requires_grad_()
    layer.fresh = False
    labels = torch.arange(8) % 4 - int(unknown is None)
    given = (resolve_labels(labels, 4, "abcd"),) if kind.startswith("cn") else ()
    found = tuple(c.launches for c in cost_of(layer, x, *given))
    assert all(a <= b for a, b in zip(found, OPERATORS[kind], strict=True)), (
        found,
        OPERATORS[kind],
    )


def test_a_context_without_values_costs_cn_six_operators():
    layer, x = normswap.ContextNorm(64, 4), torch.randn(8, 64, 4, 4).requires_grad_()
    costs = [
        cost_of(layer, x, resolve_labels(torch.arange(8) % several, 4, "abcd"))
        for several in (4, 3)
    ]
    every, some = (forward.launches + backward.launches for forward, backward, _ in costs)
    assert some - every <= 6
