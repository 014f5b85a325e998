"""Code that is compiled, exported or recomputed uses the layout measured, or is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap import ContextError
from tests.support.rows import (
    FOLDS,
    LABELS,
    ORDERS,
    K,
    N,
    converted,
    from_innermost,
    innermost,
    ordered,
    singly,
)


@pytest.mark.parametrize("trace", [True, False])
def test_compiled_training_of_what_flips_in_eval_is_refused(trace):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(x.flip(0))

    x = torch.randn(N, 6)
    model = normswap.convert(Model(), "cn", contexts=K, trace=trace, example_inputs=x)
    torch._dynamo.reset()
    with pytest.raises(ContextError, match="nothing that tells"):
        torch.compile(model.train(), backend="eager")(x, context=LABELS)


@FOLDS
def test_an_export_after_one_call_knows_the_layout(fold, unfold):
    model = converted(fold, unfold)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    expected = model(x, context=LABELS)
    exported = torch.export.export(model, (x,), {"context": LABELS}).module()
    assert torch.allclose(exported(x, context=LABELS), expected)


def test_a_compiled_fold_that_was_not_measured_is_refused():
    model = converted(innermost, from_innermost)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    with pytest.raises(Exception, match="run the whole model in this mode, not compiled"):
        torch.export.export(model, (x,), {"context": LABELS})


def test_a_compiled_flip_is_refused_unless_fixed():
    torch._dynamo.reset()
    model = ordered(ORDERS["flipped"])
    x = torch.randn(N, 6, dtype=torch.float64)
    model(x, context=LABELS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="got nothing that tells"):
        compiled(x, context=LABELS)
    torch._dynamo.reset()
    normswap.fix_rows(model)
    expected = model(x, context=LABELS)
    assert torch.allclose(compiled(x, context=LABELS), expected)


def test_compiled_chunks_that_share_a_norm_are_refused_though_fixed():
    torch._dynamo.reset()
    model = ordered(ORDERS["pieces of two"])
    normswap.fix_rows(model)
    x = torch.randn(N, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(model(x, context=LABELS), singly(model, x, LABELS))
    with pytest.raises(Exception, match="another in each of several calls"):
        torch.compile(model, backend="eager", fullgraph=True)(x, context=LABELS)


@pytest.mark.parametrize("reentrant", [True, False])
def test_chunks_that_share_a_norm_are_recomputed_in_their_order_or_refused(reentrant):
    model = ordered(ORDERS["pieces of two"])
    normswap.fix_rows(model)
    xs = [torch.randn(N, 6, dtype=torch.float64, requires_grad=True)]
    xs.append(xs[0].detach().clone().requires_grad_())
    copy.deepcopy(model)(xs[0], context=LABELS).square().sum().backward()
    y = checkpoint(lambda x: model(x, context=LABELS), xs[1], use_reentrant=reentrant)
    if reentrant:  # without gradients the forward may have taken another way
        with pytest.raises(ContextError, match=r"got nothing that tells.*exclude='norm'"):
            y.square().sum().backward()
    else:
        y.square().sum().backward()
        assert torch.allclose(xs[1].grad, xs[0].grad)
