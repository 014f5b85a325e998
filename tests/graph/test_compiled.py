"""What a compiled converted model compiles again for: not contexts, not the batch size."""

import pytest
import torch
from torch import nn

import normswap
from tests.support.models import make_inputs, make_model
from tests.support.sampling import sampled

BATCHES = [8, 6, 3, 11, 5]


class Counter:
    """A backend that runs the graph as it is and keeps the sizes of those it was given."""

    def __init__(self) -> None:
        self.sizes = []

    def __call__(self, graph, inputs):
        self.sizes.append(len(graph.graph.nodes))
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Methods with labels and without in one mode each; the others in exhaustive runs.
FIRST = [("cn", True), ("cn-x", False), ("selfnorm", True)]
OTHERS = [("acn", True), ("cn", False), ("cn-x", True), ("selfnorm", False), ("acn", False)]


@pytest.mark.parametrize(("method", "training"), sampled(FIRST + OTHERS, len(FIRST)))
def test_another_batch_size_compiles_once_more_at_most(method, training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    settings = {"contexts": 12} if normswap.get_method(method).needs_context else {}
    model = normswap.convert(model, method, verify=False, placement=None, **settings)
    counter = Counter()
    compiled = torch.compile(model.train(training), backend=counter, fullgraph=True)
    for step, batch in enumerate(BATCHES):
        given = {}
        if settings:
            # As many contexts in a batch as there are samples, then fewer, others each time.
            given["context"] = (torch.arange(batch) % (step + 2) + 5 * step) % 12
        compiled(torch.randn(batch, 3, 8, 8), **given)
    assert len(counter.sizes) <= 2


@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_the_number_of_contexts_does_not_compile_a_model_again(method):
    model = make_model("ConvNet", torch.float32)
    x = make_inputs(model, 6)
    model = normswap.convert(model, method, contexts=40).train()
    counter = Counter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for present in (1, 2, 3, 4, 5, 6):
        compiled(x, context=torch.arange(6) % present * 7)
    assert len(counter.sizes) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_labels_that_the_host_has_seen_compile_to_less(method, training):
    model = make_model("ConvNet")
    x = make_inputs(model, 6)
    model = normswap.convert(model, method, contexts=3, unknown="posterior").train(training)
    if training:  # eager and compiled forwards meet the same running statistics
        model.apply(lambda m: setattr(m, "momentum", 0.0) if hasattr(m, "momentum") else None)
    known, some = torch.arange(6) % 3, torch.tensor([0, -1, 1, 2, -1, 0])
    given = [known, some, [2] * 6, known.flip(0), some.flip(0)]
    expected = [model(x, context=labels) for labels in given]
    counter = Counter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x, context=known), expected[0])
    for labels, output in zip(given, expected, strict=True):
        with normswap.use_context(model, labels):
            torch.testing.assert_close(compiled(x), output)
    argument, seen, unknown = counter.sizes
    assert seen < 0.6 * argument
    assert unknown > 0.9 * argument


@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_compiled_gradients_where_no_label_may_be_unknown(method):
    model = make_model("ConvNet")
    x, labels = make_inputs(model, 6), torch.arange(6) % 3
    model = normswap.convert(model, method, contexts=3, unknown="error").eval()
    found = []
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        model.zero_grad()
        run(x, context=labels).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


# A compiler makes a number that changes from call to call a symbol, of which it answers little.
NUMBERS = {"index": [0, 2, 1, -1], "list": [[0, 1], [2, 0], [1, -1]], "tuple": [(0, 1), (2, 2)]}


WITH = [("cn", "index"), ("cn-x", "list"), ("cn", "tuple")]
WITH += [("cn-x", "index"), ("cn", "list"), ("cn-x", "tuple")]


@pytest.mark.parametrize(("method", "labels"), sampled(WITH, 2))
def test_numbers_that_change_from_call_to_call(method, labels):
    model = normswap.convert(nn.Sequential(nn.BatchNorm2d(4)), method, contexts=3, verify=False)
    for parameter in model.eval().parameters():
        nn.init.normal_(parameter)
    counter, x = Counter(), torch.randn(2, 4, 5, 5)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for given in NUMBERS[labels]:
        torch.testing.assert_close(compiled(x, context=given), model(x, context=given))
    assert len(counter.sizes) <= 3
