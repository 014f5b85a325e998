"""A context less: the others stay as they are, and what looks at all of them looks at those."""

import copy

import pytest
import timm.optim
import torch
from torch import nn

import normswap
from normswap import ContextWarning, ConversionError
from tests.support import oracles
from tests.support.builders import SKEWED, assert_close, make_batch, trained_norm
from tests.support.models import NAMES, make_inputs, make_model, same, separate
from tests.support.more_contexts import KINDS, POLICIES, hook, parametrize, wrap
from tests.support.sampling import sampled

quiet = pytest.mark.filterwarnings("ignore:without '", "ignore:samples without a label are now")
EACH = pytest.mark.parametrize("kind", KINDS)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "timm lookahead": lambda p: timm.optim.Lookahead(torch.optim.SGD(p, 1e-4, momentum=0.9)),
}


def make(method="cn", name="ConvNet", **settings):
    base = make_model(name, torch.float64)
    settings = {"contexts": NAMES, "priors": SKEWED, **settings}
    return separate(normswap.convert(base, method, **settings)).eval()


def step(model, optimizer, labels, seed=0):
    optimizer.zero_grad()
    model.train()(make_inputs(model, seed=seed), context=labels).square().sum().backward()
    optimizer.step()


@quiet
@EACH
@pytest.mark.parametrize("like", ["b", "pooled"])
def test_it_undoes_add_context_to_the_bit(kind, like):
    model = make(**KINDS[kind])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    step(model, optimizer, [0, 1, 2, 0, 1, 2])
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    text = str(normswap.summary(model))
    normswap.add_context(model, "d", like=like, keep_unknown=True, optimizer=optimizer)
    normswap.remove_context(model, "d", optimizer=optimizer)
    assert same(model.state_dict(), before)
    assert same({name: p.grad for name, p in model.named_parameters()}, gradients)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(
        map(id, model.parameters())
    )
    for key, values in optimizer.state_dict()["state"].items():
        assert same(values, state["state"][key])
    assert str(normswap.summary(model)) == text


# Those of one table of statistics a context, and of one for all, first.
@pytest.mark.parametrize("kind", sampled(sorted(KINDS, key=lambda k: k not in ("cn", "cn-x")), 2))
@quiet
def test_compiled_code_follows(kind):
    model = make(**KINDS[kind])
    x = make_inputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x, context=torch.tensor([0, 1, 2, 0, 1, 2]))
    expected = model(x, context=["c", "a"] * 3)
    normswap.remove_context(compiled, "b")
    assert_close(compiled(x, context=torch.tensor([1, 0] * 3)), expected)


@quiet
@EACH
def test_given_labels_compute_what_they_did_and_names_follow(kind, tmp_path):
    model = make(**KINDS[kind])
    x = make_inputs(model)
    expected = model(x, context=["c", "a"] * 3)
    normswap.remove_context(model, "b")
    labels = torch.tensor([1, 0] * 3)
    assert torch.equal(model(x, context=["c", "a"] * 3), expected)
    assert torch.equal(model(x, context=labels), expected)
    report = normswap.summary(model)
    assert report.contexts == ("a", "c")
    assert report.priors == pytest.approx([7 / 8, 1 / 8])
    assert all(row.contexts == 2 for row in report.rows)
    normswap.save(model, tmp_path)
    base = make_model(KINDS[kind].get("name", "ConvNet"), torch.float64)
    twin = normswap.load(base, tmp_path)
    for each in (twin, copy.deepcopy(model)):
        assert torch.equal(each(x, context=labels), expected)
        assert torch.equal(each(x), model(x))
    with pytest.raises(normswap.UnknownNameError, match="unknown context 'b'; the choices are a"):
        model(x, context="b")
    with pytest.raises(normswap.ContextError, match=r"in \[0, 2\)"):
        model(x, context=2)


@quiet
@POLICIES
def test_unknown_labels_are_the_loop_over_the_contexts_left(unknown):
    base = nn.Sequential(trained_norm().double())
    x, labels, priors = make_batch((6, 4, 3, 5)), [-1] * 6, [0.875, 0.125]
    for method in ("cn", "cn-x"):
        given = {"contexts": NAMES, "priors": SKEWED, "unknown": unknown}
        model = separate(normswap.convert(base, method, **given)).eval()
        old = {key: t.clone()[[0, 2]] for key, t in model[0].state_dict().items() if t.dim() == 2}
        normswap.remove_context(model, "b")
        layer = model[0]
        if method == "cn":
            # The layer's lambda is what it divides by; that of the mixture sums to one again.
            root = (layer.priors.double() / torch.tensor(priors).double()).sqrt()[:, None]
            running = oracles.Running(old["running_mean"], old["running_var"], [1, 1])
            tables = old["weight"] / root, old["bias"] / root, running
            expected = oracles.cn(x, labels, *tables, priors, layer.eps, unknown)
        else:
            tables = layer.weight, layer.bias, old["mu"], old["log_sigma"]
            expected = oracles.cnx(x, labels, *tables, priors, unknown)
        assert_close(model(x), expected, 1e-6)


@quiet
@EACH
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_others_train_on_as_if_it_was_there_without_samples(name, kind):
    model = make(**KINDS[kind])
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(2):
        step(model, optimizer, [0, 1, 2, 0, 1, 2], seed)
    twin = copy.deepcopy(model)
    other = OPTIMIZERS[name](twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    normswap.remove_context(model, 1, optimizer=optimizer)
    for seed in range(2, 4):
        step(model, optimizer, [0, 1] * 3, seed)
        step(twin, other, [0, 2] * 3, seed)
    x = make_inputs(model)
    actual, expected = (m.eval()(x, context=["a", "c"] * 3) for m in (model, twin))
    assert_close(actual, expected, 1e-10)


def test_numbers_that_mean_other_contexts_are_warned_of():
    model = make()
    with pytest.warns(ContextWarning, match="without 'a', labels .* b is 0, c is 1$"):
        normswap.remove_context(model, "a")
    normswap.remove_context(model, "c")  # the last: no warning
    x = make_inputs(model)
    assert torch.equal(model(x), model(x, context="b"))
    assert torch.equal(normswap.specialize(model)(x), normswap.specialize(model, "b")(x))


@quiet
def test_the_policy_follows_its_context():
    model = make(unknown="c")
    x = make_inputs(model)
    expected = model(x)
    normswap.remove_context(model, "a")
    assert torch.equal(model(x), expected)
    assert normswap.summary(model).unknown == "c"


@quiet
@POLICIES
def test_contexts_kept_out_of_the_mixture_stay_out(unknown):
    model = make(unknown=unknown)
    for name in ("d", "e"):
        normswap.add_context(model, name, keep_unknown=True)
    twin, x = copy.deepcopy(model), make_inputs(model)
    normswap.remove_context(model, "d")
    assert_close(model(x), twin(x))
    normswap.remove_context(model, "b")
    assert normswap.summary(model).unknown == f"{unknown} of a, c"
    normswap.remove_context(model, "e")
    assert normswap.summary(model).unknown == unknown


@pytest.mark.parametrize(
    ("context", "change", "match"),
    [
        ("d", None, "unknown context 'd'; the choices are a, b, c"),
        (3, None, r"in \[0, 3\), got 3"),
        ("c", None, "answered by context 'c' alone; .*set_unknown first"),
        ("a", wrap, r"give its \.module"),
        ("a", parametrize, r"stem\.1\.weight is neither a parameter nor a buffer"),
        ("a", hook, r"neck\.bias has hooks"),
    ],
    ids=lambda v: getattr(v, "__name__", str(v))[:12],
)
def test_what_is_refused_changes_nothing(context, change, match):
    model = make(unknown="c")
    changed = model if change is None else change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(normswap.NormswapError, match=match):
        normswap.remove_context(changed, context)
    assert same(model.state_dict(), before)
    assert normswap.summary(model).contexts == tuple(NAMES)


def test_an_optimizer_that_cannot_follow_is_refused_first():
    model = make()
    before = copy.deepcopy(model.state_dict())
    for optimizer, match in (
        (torch.optim.LBFGS(model.parameters()), "one flat history"),
        (torch.optim.SGD([model.head.weight], 0.1), "found none"),
    ):
        with pytest.raises(ConversionError, match=match):
            normswap.remove_context(model, "a", optimizer=optimizer)
        assert same(model.state_dict(), before)


def test_the_last_context_and_methods_without_are_refused():
    with pytest.raises(ConversionError, match=r"'0' is the only context; normswap\.specialize"):
        normswap.remove_context(normswap.convert(make_model(), "cn"), 0)
    with pytest.raises(ConversionError, match="'acn' has no contexts to remove"):
        normswap.remove_context(normswap.convert(make_model(), "acn"), 0)


@quiet
def test_the_only_context_that_answers_stays():
    model = make(contexts=["a"], priors=None, unknown="pooled")
    normswap.add_context(model, "b", keep_unknown=True)
    with pytest.raises(ConversionError, match="answered by context 'a' alone"):
        normswap.remove_context(model, "a")
    normswap.set_unknown(model, "pooled")
    normswap.remove_context(model, "a")
    assert normswap.summary(model).contexts == ("b",)


@quiet
def test_names_and_numbers_follow_where_a_copy_took_the_place_of_the_part_with_all_norms():
    base = nn.Sequential(make_model("ConvNet", torch.float64))
    model = separate(normswap.convert(base, "cn", contexts=NAMES)).eval()
    model[0] = copy.deepcopy(model[0])
    x = make_inputs(model[0])
    expected = model(x, context="b")
    normswap.remove_context(model, "a")
    for label in ("b", 0, ["b"] * len(x)):
        assert torch.equal(model(x, context=label), expected)
    with normswap.use_context(model, "b"):
        assert torch.equal(model(x), expected)
    assert_close(model(x, context=normswap.add_context(model, "d", like="b")), expected)


@quiet
def test_a_context_that_is_named_by_nobody_gets_a_name_that_is_free():
    model = make(contexts=3, priors=None)
    normswap.remove_context(model, "0")
    assert normswap.add_context(model) == 2
    assert normswap.summary(model).contexts == ("1", "2", "3")
