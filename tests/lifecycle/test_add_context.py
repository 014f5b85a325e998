"""A context more: the optimizer follows, training goes on, nothing else moves."""

import copy
import types

import pytest
import timm.optim
import torch

import normswap
from normswap import ConversionError
from tests.support.builders import SKEWED, assert_close
from tests.support.models import make_inputs, make_model, same, separate
from tests.support.more_contexts import Quantised, hook, parametrize, wrap
from tests.support.sampling import crossed

pytestmark = pytest.mark.filterwarnings("ignore:samples without a label are now answered")
EACH = pytest.mark.parametrize("method", ["cn", "cn-x"])
NAMES = ["a", "b", "c"]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def make(method, name="ConvNet", **settings):
    settings = {"contexts": NAMES, "priors": SKEWED, **settings}
    return normswap.convert(make_model(name, torch.float64), method, **settings)


def step(model, optimizer, labels=LABELS, seed=0):
    optimizer.zero_grad()
    model.train()(make_inputs(model, seed=seed), context=labels).square().sum().backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "timm lamb": lambda p: timm.optim.Lamb(p, 0.01),
    "timm adafactor": lambda p: timm.optim.Adafactor(p, 0.01),
    "timm lion": lambda p: timm.optim.Lion(p, 0.001),
    "timm madgrad": lambda p: timm.optim.MADGRAD(p, 0.01),
    "timm lookahead": lambda p: timm.optim.Lookahead(torch.optim.SGD(p, 1e-4, momentum=0.9)),
    "accelerate around it": lambda p: prepare(OPTIMIZERS["timm lookahead"](p)),
}


def prepare(optimizer):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.parametrize(("name", "method"), crossed(OPTIMIZERS, ["cn", "cn-x"]))
def test_the_other_contexts_train_on_as_if_nothing_was_added(name, method):
    model = separate(make(method))
    # Clipping by the size of a whole parameter, as these two do, sees the new row.
    whole = name in ("adafactor", "timm lamb", "timm adafactor")
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(3):
        step(model, optimizer, seed=seed)
    twin = copy.deepcopy(model)
    other = OPTIMIZERS[name](twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert normswap.add_context(model, "d", like="b", optimizer=optimizer) == 3
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    for seed in range(3, 6):
        step(model, optimizer, seed=seed)
        step(twin, other, seed=seed)
    x = make_inputs(model)
    actual, expected = (m.eval()(x, context=LABELS) for m in (model, twin))
    assert_close(actual, expected, 0.1 if whole else 1e-10)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 2}
    step(model, optimizer, torch.full((6,), 3))
    for parameter in (p for n, p in model.named_parameters() if n in before and len(p) == 4):
        assert parameter.grad[3].abs().sum() > 0


@EACH
def test_state_of_the_new_row_is_that_of_the_context_it_is_like(method):
    for like in ("b", "pooled"):
        model = separate(make(method))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        step(model, optimizer)
        name = "neck.weight" if method == "cn" else "neck.mu"
        old = optimizer.state[dict(model.named_parameters())[name]]["exp_avg_sq"].clone()
        normswap.add_context(model, "d", like=like, optimizer=optimizer)
        state = optimizer.state[dict(model.named_parameters())[name]]
        row = old[1] if like == "b" else torch.tensor(SKEWED, dtype=torch.float64) @ old
        assert_close(state["exp_avg_sq"], torch.cat([old, row[None]]))
        assert float(state["step"]) == 1
        assert len(optimizer.state) == len(list(model.parameters()))


@EACH
def test_gradients_freezing_and_attributes_of_parameters_stay(method):
    model = make(method)
    model.stem[1].requires_grad_(False)
    model.neck.bias.tag = "kept"
    model(make_inputs(model), context=LABELS).square().sum().backward()
    before = {n: p.grad for n, p in model.named_parameters()}
    normswap.add_context(model, "d")
    assert not any(p.requires_grad for p in model.stem[1].parameters())
    assert model.neck.bias.tag == "kept"
    for name, parameter in model.named_parameters():
        grad = before[name]
        assert (parameter.grad is None) == (grad is None)
        if grad is not None:
            assert torch.equal(parameter.grad[: len(grad)], grad)
            assert not parameter.grad[len(grad) :].any()


@EACH
def test_shares_follow_and_the_others_keep_their_ratios(method):
    model = make(method)
    normswap.add_context(model, "d", share=0.5)
    assert normswap.summary(model).priors == pytest.approx([0.35, 0.1, 0.05, 0.5])
    mixing = model.neck.mixing(torch.float64)
    assert_close(mixing, torch.tensor([0.35, 0.1, 0.05, 0.5]).double(), 1e-6)
    assert normswap.summary(model).contexts == (*NAMES, "d")
    assert all(row.contexts == 4 for row in normswap.summary(model).rows)


@EACH
def test_names_indices_and_masks_know_the_new_context(method):
    model = make(method, unknown="b")
    x = make_inputs(model)
    before = model(x)
    normswap.add_context(model, like="a")
    assert torch.equal(model(x), before)
    assert torch.equal(model(x, context="3"), model(x, context=3))
    assert torch.equal(model(x, context=["3", "a"] * 3), model(x, context=[3, 0] * 3))
    with pytest.raises(normswap.ContextError, match=r"in \[0, 4\)"):
        model(x, context=4)


@EACH
def test_from_one_context_to_two(method):
    base = make_model(dtype=torch.float64)
    model = normswap.convert(base, method)
    x = make_inputs(model)
    expected = model(x)
    assert normswap.add_context(model, "night", like=0) == 1
    assert torch.equal(model(x, context=0), expected)
    assert_close(model(x, context=torch.tensor([0, 1, 0, 1, -1, 0])), expected)
    assert_close(model(x), expected)
    with pytest.raises(normswap.MissingContextError, match="contexts: 0, night"):
        model.train()(x)


@EACH
def test_copies_pickles_compiled_and_saved_models_know_it(method, tmp_path):
    model = separate(make(method, "Windows"))
    x = make_inputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(x, context=LABELS)
    assert_close(compiled(x, context=LABELS), expected)
    normswap.add_context(compiled, "d", like="c")
    labels = torch.tensor([3, 2, 1, 0, -1, 3])
    expected = model(x, context=labels)
    assert_close(compiled(x, context=labels), expected)
    assert torch.equal(copy.deepcopy(model)(x, context=labels), expected)
    normswap.save(model, tmp_path)
    twin = normswap.load(make_model("Windows", torch.float64), tmp_path)
    assert torch.equal(twin(x, context=labels), expected)
    assert_close(normswap.specialize(twin, "d")(x), model(x, context="d"))
    fresh = make(method, "Windows", contexts=4, priors=None)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x, context=labels), expected)
    fresh.load_state_dict(make_model("Windows", torch.float64).state_dict())
    assert_close(fresh(x, context=labels), make_model("Windows", torch.float64)(x))


def test_an_instance_norm_grows_too():
    model = separate(make("cn", "Instance"))
    x = make_inputs(model)
    expected = model(x, context="b")
    normswap.add_context(model, "d", like="b")
    assert_close(model(x, context="d"), expected)


REFUSED = [
    ({"name": "a"}, None, "there is a context 'a' already; the contexts are a, b, c"),
    ({"name": "posterior"}, None, "is a policy"),
    ({"name": 3}, None, "as a string, got 3"),
    ({"name": ""}, None, "as a string, got ''"),
    ({"name": "d", "share": 1}, None, r"share= in \(0, 1\), got 1"),
    ({"name": "d", "share": float("nan")}, None, "share="),
    ({"name": "d", "share": 1e-40}, None, "at least 1e-06 from both ends"),
    ({"name": "d", "like": "e"}, None, "unknown context 'e'"),
    ({"name": "d", "like": "posterior"}, None, "weighs the contexts by each input"),
    ({"name": "d"}, wrap, r"give its \.module"),
    ({"name": "d"}, parametrize, r"stem\.1\.weight is neither a parameter nor a buffer"),
    ({"name": "d"}, hook, r"neck\.bias has hooks"),
]


@pytest.mark.parametrize(
    ("arguments", "change", "match"), REFUSED, ids=lambda v: getattr(v, "__name__", str(v))[:30]
)
def test_what_is_refused_changes_nothing(arguments, change, match):
    model = separate(make("cn"))
    changed = model if change is None else change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(normswap.NormswapError, match=match):
        normswap.add_context(changed, **arguments)
    assert same(model.state_dict(), before)
    assert normswap.summary(model).contexts == tuple(NAMES)


STATES = {
    # A preconditioner for each side of a parameter, as Shampoo's.
    "left": lambda p: torch.eye(len(p)),
    # A number a row, or a column, of parameters with as many of both.
    "line": lambda p: torch.ones(len(p)),
    "exp_avg": lambda p: torch.zeros_like(p).detach().as_subclass(Quantised),
    # As GaLore's.
    "projector": lambda p: types.SimpleNamespace(side="left"),
}


def keeping(key):
    """Return what makes an optimizer that keeps such a state."""

    def make_optimizer(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for parameter in model.parameters():
            optimizer.state[parameter][key] = STATES[key](parameter)
        return optimizer

    return make_optimizer


@pytest.mark.parametrize(
    ("make_optimizer", "contexts", "match"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters()), 3, "one flat history"),
        (lambda m: torch.optim.SGD([m.head.weight], 0.1), 3, "found none"),
        (keeping("left"), 3, "cannot tell .* the optimizer's state 'left' of stem.1.weight"),
        (keeping("line"), 4, "cannot tell the rows of the optimizer's state 'line'"),
        (keeping("exp_avg"), 3, "cannot tell the rows of the optimizer's state 'exp_avg'"),
        (keeping("projector"), 3, "state 'projector' of stem.1.weight.*; make .* anew"),
    ],
)
def test_an_optimizer_that_cannot_follow_is_refused_first(make_optimizer, contexts, match):
    model = make("cn", contexts=contexts, priors=None)
    optimizer = make_optimizer(model)
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConversionError, match=match):
        normswap.add_context(model, "x", optimizer=optimizer)
    assert same(model.state_dict(), before)
    assert str(optimizer.state_dict()) == str(state)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} <= set(
        map(id, model.parameters())
    )


def test_adafactor_of_one_context_is_refused_rather_than_guessed():
    model = make("cn", contexts=1, priors=None)
    optimizer = torch.optim.Adafactor(model.parameters(), 0.01)
    step(model, optimizer, None)
    with pytest.raises(ConversionError, match="make the optimizer anew"):
        normswap.add_context(model, "x", optimizer=optimizer)


@EACH
def test_in_inference_mode_contexts_are_added_and_removed_for_training(method):
    model = make(method)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    step(model, optimizer)
    with torch.inference_mode():
        normswap.add_context(model, "d", optimizer=optimizer)
        normswap.remove_context(model, "d", optimizer=optimizer)
    step(model, optimizer)


def test_what_is_no_optimizer_is_refused():
    model = make("cn")
    with pytest.raises(ConversionError, match="as a torch optimizer, got str"):
        normswap.add_context(model, "x", optimizer="adam")
    assert normswap.summary(model).contexts == tuple(NAMES)


def test_methods_without_contexts_are_refused():
    model = normswap.convert(make_model(), "acn")
    with pytest.raises(ConversionError, match="'acn' has no contexts to add to"):
        normswap.add_context(model, "a")
