"""Children that are wrapped, copied or replaced after conversion still get the labels."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.nn.parallel import DataParallel

import normswap
from tests.support.behave import CHANNELS, LABELS, Block, Holder, images, separate
from tests.support.sampling import sampled

# Dynamo looks at .grad of what it is given, a leaf or not.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Both(Holder):
    def forward(self, x):
        return self.b(self.a(x))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Wrapper(nn.Module):
    """Like a sharding or quantising wrapper: takes anything, passes it on."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Adapter(nn.Module):
    """Like PEFT's modules to save: a copy runs, the original stays beside it."""

    def __init__(self, module):
        super().__init__()
        self.original = module
        self.copies = nn.ModuleDict({"default": copy.deepcopy(module)})

    def forward(self, x):
        return self.copies["default"](x)


class Residual(nn.Module):
    """Like a low-rank adapter beside a block."""

    def __init__(self, module):
        super().__init__()
        self.base = module
        self.down = nn.Conv2d(CHANNELS, CHANNELS, 1)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        return self.base(x) + self.down(x)


WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "reentrant": lambda m: checkpoint_wrapper(m, checkpoint_impl=CheckpointImpl.REENTRANT),
    "parallel": DataParallel,
    "sequential": lambda m: nn.Sequential(m, nn.Identity()),
    "twice": lambda m: nn.Sequential(Wrapper(m)),
    "forwarding": Wrapper,
    "adapter": Adapter,
    "residual": Residual,
    "copy": copy.deepcopy,
}


def make(model):
    torch.manual_seed(0)
    converted = normswap.convert(model.eval(), "cn", contexts=3, verify=False)
    separate(converted)
    return converted


def run(model, **given):
    """Return the output and the gradients of the input and of the norms that ran."""
    x = images().requires_grad_()
    y = model(x, **given)
    y.sin().sum().backward()
    norms = [m for m in model.modules() if isinstance(m, normswap.ContextNorm)]
    grads = [n.weight.grad for n in norms if n.weight.grad is not None]
    model.zero_grad()
    return [y.detach(), x.grad, *grads]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_child_wrapped_after_conversion(wrap, training):
    plain = make(Both()).train(training)
    wrapped = copy.deepcopy(plain)
    wrapped.a = wrap(wrapped.a)
    assert_same(run(wrapped, context=LABELS), run(plain, context=LABELS))
    with normswap.use_context(wrapped, LABELS):
        inside = run(wrapped)
    assert_same(inside, run(plain, context=LABELS))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_child_wrapped_after_runs_then_unwrapped(wrap):
    plain = make(Listed())
    wrapped = copy.deepcopy(plain)
    for _ in range(2):
        expected = run(plain, context=LABELS)
        assert_same(run(wrapped, context=LABELS), expected)
        kept = wrapped.blocks[1]
        wrapped.blocks[1] = wrap(kept)
        assert_same(run(wrapped, context=LABELS), expected)
        wrapped.blocks._modules["1"] = kept


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_norm_wrapped_after_conversion(wrap):
    plain = make(Both())
    wrapped = copy.deepcopy(plain)
    run(wrapped, context=LABELS)
    wrapped.b._modules["norm"] = wrap(wrapped.b.norm)
    assert_same(run(wrapped, context=LABELS), run(plain, context=LABELS))


def set_forward(module):
    """Put a forward on the instance, as accelerate's hooks do."""
    own = module.forward
    module.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))


HOOKED = {
    "forward": set_forward,
    "keywords": lambda m: m.register_forward_pre_hook(lambda *given: None, with_kwargs=True),
}


@pytest.mark.parametrize("hook", HOOKED.values(), ids=HOOKED)
@pytest.mark.parametrize("names", [["a.norm"], ["a", "b.norm"], ["", "a", "a.norm"]], ids=str)
def test_modules_hooked_after_conversion(hook, names):
    plain = make(Both())
    hooked = copy.deepcopy(plain)
    for name in names:
        hook(hooked.get_submodule(name))
    assert_same(run(hooked, context=LABELS), run(plain, context=LABELS))
    with normswap.use_context(hooked, LABELS):
        assert_same(run(hooked), run(plain, context=LABELS))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_backbone(wrap):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Both()
            self.head = nn.Conv2d(CHANNELS, 2, 1)

        def forward(self, x):
            return self.head(self.backbone(x)).mean((2, 3))

    plain = make(Classifier())
    wrapped = copy.deepcopy(plain)
    wrapped.backbone = wrap(wrapped.backbone)
    assert_same(run(wrapped, context=LABELS), run(plain, context=LABELS))


@pytest.mark.parametrize("wrap", ["compiled", "checkpoint"])
def test_the_summary_tells_what_is_below_a_wrapper(wrap):
    wrapped = make(Both())
    wrapped.a = WRAPPERS[wrap](wrapped.a)
    run(wrapped, context=LABELS)
    assert [row.delivery for row in normswap.summary(wrapped).rows] == ["threaded", "threaded"]


# The others that compile are modules that call one child, as "forwarding" does.
COMPILED = [("compiled", True), ("checkpoint", False), ("forwarding", True), ("copy", False)]
ALIKE = ["checkpoint", "copy", "adapter", "sequential", "twice", "residual"]


@pytest.mark.parametrize(
    ("wrap", "early"), sampled(COMPILED + [(w, True) for w in ALIKE], len(COMPILED))
)
def test_a_model_with_a_wrapped_child_compiles(wrap, early):
    plain = make(Both())
    wrapped = copy.deepcopy(plain)
    wrapped.a = WRAPPERS[wrap](wrapped.a)
    if early:
        run(wrapped, context=LABELS)
    torch._dynamo.reset()
    compiled = torch.compile(wrapped, backend="eager", fullgraph=True)
    assert_same(run(compiled, context=LABELS), run(plain, context=LABELS))
    assert_same(run(compiled, context=LABELS.flip(0)), run(plain, context=LABELS.flip(0)))


def test_a_child_wrapped_inside_a_checkpointed_part():
    class Model(Holder):
        def forward(self, x):
            both = lambda x: self.b(self.a(x))  # noqa: E731
            return torch.utils.checkpoint.checkpoint(both, x, use_reentrant=False)

    plain = make(Model())
    for wrap in WRAPPERS.values():
        wrapped = copy.deepcopy(plain)
        wrapped.b = wrap(wrapped.b)
        one, other = images().requires_grad_(), images().requires_grad_()
        (wrapped(one, context=LABELS) + wrapped(one, context=LABELS.flip(0)).sin()).sum().backward()
        (plain(other, context=LABELS) + plain(other, context=LABELS.flip(0)).sin()).sum().backward()
        torch.testing.assert_close(one.grad, other.grad)


def test_a_model_of_its_own_keeps_its_own_labels():
    inner = make(Both())
    outer = make(Both())
    plain = copy.deepcopy(outer)
    outer.a = inner
    expected = plain.b(inner(images()), context=LABELS)
    torch.testing.assert_close(outer(images(), context=LABELS), expected)
    with normswap.use_context(outer, LABELS):
        torch.testing.assert_close(outer(images()), expected)
    with normswap.use_context(inner, LABELS.flip(0)):
        both = outer(images(), context=LABELS)
    first = inner(images(), context=LABELS.flip(0))
    torch.testing.assert_close(both, plain.b(first, context=LABELS))
