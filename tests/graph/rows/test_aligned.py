"""Row i declared to be of sample i: nodes of a graph, which messages mix."""

import copy
import pickle

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import ContextError

NODES, CHANNELS, K = 12, 6, 3


class Graphs(nn.Module):
    """Two rounds of messages over edges, (2, E), with a norm after each."""

    def __init__(self, pooled=False):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.norm1, self.norm2 = nn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS)
        self.last = nn.BatchNorm1d(CHANNELS) if pooled else None

    def forward(self, x, edges, batch):
        for lin, norm in ((self.lin1, self.norm1), (self.lin2, self.norm2)):
            x = x.index_add(0, edges[1], x[edges[0]])
            x = torch.relu(norm(lin(x)))
        if self.last is None:
            return x
        return self.last(x.new_zeros(3, CHANNELS).index_add(0, batch, x))


def given(nodes=NODES, seed=0):
    torch.manual_seed(seed)
    return (
        torch.randn(nodes, CHANNELS),
        torch.randint(nodes, (2, 4 * nodes)),
        torch.arange(nodes) % 3,
    )


def converted(trace=True, **settings):
    torch.manual_seed(1)
    model = normswap.convert(Graphs(**settings), "cn", contexts=K, trace=trace).double()
    for norm in (model.norm1, model.norm2):
        for t in (norm.running_mean, norm.weight.data, norm.bias.data):
            t.copy_(torch.randn_like(t))
        norm.running_var.copy_(torch.rand_like(norm.running_var) + 0.5)
    return model


def by_loop(model, x, edges, labels):
    """Compute the model with each norm written out for the nodes of each label."""
    for lin, norm in ((model.lin1, model.norm1), (model.lin2, model.norm2)):
        x = lin(x.index_add(0, edges[1], x[edges[0]]))
        out = torch.empty_like(x)
        for k in range(K):
            own = labels == k
            mean, var = norm.running_mean[k], norm.running_var[k]
            if norm.training:
                mean, var = x[own].mean(0), x[own].var(0, unbiased=False)
            scale = norm.weight[k] / (var + norm.eps).sqrt()
            out[own] = ((x[own] - mean) * scale + norm.bias[k]) / norm.priors[k].sqrt()
        x = torch.relu(out)
    return x


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_each_node_gets_its_own_label(training, trace):
    model = converted(trace).train(training)
    normswap.fix_rows(model, aligned=True)
    for seed, nodes in enumerate((NODES, 2 * NODES, NODES + 1)):  # graphs of any size
        x, edges, batch = given(nodes, seed)
        labels = torch.arange(nodes) % K
        expected = by_loop(model, x.double(), edges, labels)
        torch.testing.assert_close(model(x.double(), edges, batch, context=labels), expected)


def test_without_it_the_error_names_it_and_nothing_is_guessed():
    model = converted().eval()
    x, edges, batch = given()
    labels = torch.arange(NODES) % K
    with pytest.raises(ContextError, match=r"several samples.*fix_rows\(model, aligned=True\)"):
        model(x.double(), edges, batch, context=labels)
    normswap.fix_rows(model, aligned=True)
    model(x.double(), edges, batch, context=labels)
    assert "declared" in str(normswap.summary(model))
    normswap.fix_rows(model, aligned=False)
    with pytest.raises(ContextError, match="several samples"):
        model(x.double(), edges, batch, context=labels)


def test_other_numbers_of_rows_are_an_error():
    model = converted(pooled=True).eval()
    normswap.fix_rows(model, aligned=True)
    x, edges, batch = given()
    with pytest.raises(ContextError, match=r"a row a label at last.*got 3 rows for 12 labels"):
        model(x.double(), edges, batch, context=torch.arange(NODES) % K)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_it(copied):
    model = converted().eval()
    normswap.fix_rows(model, aligned=True)
    x, edges, batch = given()
    labels = torch.arange(NODES) % K
    expected = model(x.double(), edges, batch, context=labels)
    assert copied(model)(x.double(), edges, batch, context=labels).equal(expected)


def test_compiled_as_one_graph():
    model = converted().eval()
    normswap.fix_rows(model, aligned=True)
    x, edges, batch = given()
    labels = torch.arange(NODES) % K
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x.double(), edges, batch, context=labels)
    torch.testing.assert_close(compiled(x.double(), edges, batch, context=labels), expected)


class Graph:
    """Nodes and edges in an object, of which nothing tells a batch."""

    def __init__(self, x, edges, batch):
        self.x, self.edges, self.batch = x, edges, batch


class OfObjects(nn.Module):
    def __init__(self):
        super().__init__()
        self.graphs = Graphs(pooled=True)

    def forward(self, graph):
        return self.graphs(graph.x, graph.edges, graph.batch)


def test_inputs_without_a_batch_are_compared_a_context_at_a_time():
    model = normswap.convert(OfObjects(), "cn", contexts=K, example_inputs=(Graph(*given()),))
    found = normswap.verify(model, normswap.revert(model), (Graph(*given()),))
    assert list(found.differences) == ["unknown", "0", "1", "2"]
    assert max(found.differences.values()) < 1e-5 * found.scale


def test_a_wrong_context_of_such_inputs_is_found():
    model = normswap.convert(OfObjects(), "cn", contexts=K, unknown="0")
    original = normswap.revert(model)
    model.graphs.norm2.running_mean[1] += 1
    with pytest.raises(normswap.errors.VerificationError, match="context 1"):
        normswap.verify(model, original, (Graph(*given()),))
