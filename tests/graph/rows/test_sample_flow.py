"""What operators tell of rows, held against exchanging the samples one by one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import normswap
from normswap.functional import backend
from normswap.graph.rows.measure import Measurement
from normswap.graph.rows.sample_flow import SampleFlow

N = 3
ARGUMENTS = (N, 4, 6, 6)
W = torch.randn(6, 4, 3, 3, dtype=torch.float64)
SQUARE = torch.randn(6, 6, dtype=torch.float64)
ORDER = torch.tensor([2, 0, 1])

TOLD = {
    "convolution": lambda x: F.conv2d(x, W),
    "transposed": lambda x: F.conv_transpose2d(x, W[:4, :4]),
    "linear": lambda x: F.linear(x, SQUARE),
    "matmul": lambda x: x @ SQUARE,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention by hand": lambda x: (x @ x.transpose(-1, -2)).softmax(-1) @ x,
    "broadcast": lambda x: x * SQUARE + x.mean((2, 3), keepdim=True) / 2,
    "in place": lambda x: x.clone().add_(x).relu_(),
    "activations": lambda x: F.hardswish(F.gelu(F.silu(x))) + F.logsigmoid(x) + F.mish(x),
    "chosen": lambda x: torch.where(x > 0, x, SQUARE).masked_fill(x > 1, 1.0),
    "prelu": lambda x: F.prelu(x, SQUARE[0, :4]),
    "pooled": lambda x: F.max_pool2d(F.avg_pool2d(x, 2), 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 2),
    "one image a row": lambda x: F.max_pool2d(x[:, 0], 2),
    "group norm": lambda x: F.group_norm(x, 2),
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "batch norm in eval": lambda x: F.batch_norm(x, SQUARE[0, :4], SQUARE[1, :4].abs()),
    "padded": lambda x: F.pad(x, (1, 1, 0, 2)) + F.pad(x, (1, 1, 1, 1), "reflect")[..., :1, :1],
    "resized": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "shuffled": lambda x: F.pixel_shuffle(x, 2),
    "joined": lambda x: torch.cat([x, x, torch.zeros_like(x)], 1),
    "stacked": lambda x: torch.stack([x, x], -1),
    "taken apart": lambda x: torch.cat([*x.chunk(2, 1), *x.split(2, 1)], 2),
    "parts": lambda x: x[:, 1:3, ::2].sum(-1) + x.unbind(2)[0][:, :2, :3],
    "whole": lambda x: x[:, :2][0 : len(x)],
    "folded": lambda x: F.linear(x.flatten(0, 2), SQUARE),
    "windows": lambda x: x.view(-1, 4, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, 4),
    "unfolded again": lambda x: x.flatten(0, 1).mul(2).unflatten(0, (-1, 4)).transpose(1, 3),
    "statistics": lambda x: torch.var_mean(x, (2, 3))[0] + x.amax((2, 3)) + x.std((2, 3)),
    "largest": lambda x: x.flatten(2).sort(2).values + x.flatten(2).max(-1, keepdim=True).values,
    "moved": lambda x: x.roll(1, 2).flip(3),
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "looked up": lambda x: F.embedding(x[:, 0, 0].gt(0).long(), SQUARE),
    "as others": lambda x: x + torch.zeros_like(x).add_(1.0) + x.new_ones(len(x), 1, 1, 1),
    "other type": lambda x: x.float().double().contiguous(memory_format=torch.channels_last),
    "squeezed": lambda x: x.mean((2, 3), keepdim=True).squeeze(),
}  # fmt: skip
# Rows in another order, of several samples, or of none that this way can tell.
NOT_TOLD = {
    "another order": lambda x: x[ORDER],
    "flipped": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(1, 0),
    "in two steps": lambda x: x.flip(0).flip(0),
    "transposed": lambda x: x.transpose(0, 1),
    "by position": lambda x: x.permute(2, 0, 1, 3).reshape(-1, 4, 6),
    "one after another": lambda x: torch.cat([x, x]),
    "row by row": lambda x: torch.stack(list(x)),
    "less the mean": lambda x: x - x.mean(0, keepdim=True),
    "batch norm in training": lambda x: F.batch_norm(x, None, None, training=True),
    "second factor": lambda x: SQUARE[:3, :3] @ x.flatten(1),
    "against dimension 1": lambda x: x[:, :3, :3, 0] + x[:, 0, 0, 0],
    "as one image": lambda x: F.conv2d(x.reshape(1, -1, 6, 6), W.repeat(1, 3, 1, 1)),
    "one row": lambda x: x[1:2].expand(N, -1, -1, -1),
    "some rows": lambda x: x[x[:, 0, 0, 0] > -9],
    "written": lambda x: torch.zeros_like(x).copy_(x),
    "put": lambda x: x.clone().index_put_((torch.tensor([0]),), x[1:2]),
    "softmax over samples": lambda x: x.softmax(0),
    "layer norm over all": lambda x: F.layer_norm(x, x.shape),
    "sorted": lambda x: x.sort(0).values,
    "copied past operators": lambda x: x + copy.deepcopy(x).flip(0),
    "copied by NumPy": lambda x: x + torch.from_numpy(x.numpy()[::-1].copy()),
    "copied into": lambda x: x + torch.empty(x.shape).copy_(x).flip(0),
    "out": lambda x: x + torch.add(x, 1.0, out=torch.empty_like(x)).flip(0),
    "by gradients": lambda x: torch.autograd.grad(x.requires_grad_().pow(2).sum(), x)[0],
}  # fmt: skip


def rows_moved(function, x):
    """Return for each sample which rows move as it is exchanged for another."""
    before = function(x)
    moved = []
    for sample in range(len(x)):
        other = x.clone()
        other[sample] = torch.randn_like(x[sample])
        moved.append((function(other) != before).flatten(1).any(1))
    return torch.stack(moved)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", TOLD)
def test_rows_that_operators_tell_move_with_their_sample_alone(name, mode):
    x, function = torch.randn(ARGUMENTS, dtype=torch.float64), TOLD[name]
    with mode(), SampleFlow(N) as flow:
        y = function(flow.follow(x.clone().requires_grad_(mode is torch.enable_grad)))
    times = flow.rows_a_sample(y)
    assert times == len(y) // N, flow.broken
    owners = torch.arange(len(y)) // times
    others = owners != torch.arange(N).unsqueeze(1)
    assert not (rows_moved(function, x) & others).any()


@pytest.mark.parametrize("name", NOT_TOLD)
def test_other_rows_are_not_told(name):
    x, function = torch.randn(ARGUMENTS, dtype=torch.float64), NOT_TOLD[name]
    with SampleFlow(N) as flow:
        y = function(flow.follow(x))
    assert flow.rows_a_sample(y) is None


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.amax((1, 2, 3)).tolist(),
        lambda x: x.numpy().max(),
        lambda x: x.detach().data.numpy(),
        lambda x: __import__("numpy").asarray(x),
        lambda x: x.mean((1, 2, 3)).max() > 0 and None,
        lambda x: bool((x.amax((1, 2, 3)) > 0).all()),
        lambda x: x[0, 0, 0, 0].item(),
        lambda x: torch.equal(x, x + 1),
        lambda x: (x[:, 0, 0, 0] > 0).nonzero(),
        lambda x: x.data_ptr(),
        lambda x: [row for row in x],
    ],
    ids=range(11),
)
def test_nothing_is_told_once_values_are_read(read):
    x = torch.randn(ARGUMENTS)
    with SampleFlow(N) as flow:
        read(flow.follow(x))
        y = x + 1
    assert flow.rows_a_sample(y) is None


def test_other_tensors_are_not_followed():
    with SampleFlow(N) as flow:
        flow.follow(torch.randn(ARGUMENTS))
        assert flow.rows_a_sample(torch.randn(ARGUMENTS)) is None
        assert flow.rows_a_sample(torch.randn(ARGUMENTS) + 1) is None
        kept = flow.follow(torch.randn(ARGUMENTS))
    assert not flow.broken
    assert flow.rows_a_sample(kept) == 1


class Net(nn.Module):
    def __init__(self, between=lambda x: x):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(5)])
        self.between = between

    def forward(self, x):
        return self.norms[1](self.second(self.between(self.norms[0](self.first(x)))))


@pytest.fixture
def runs(monkeypatch):
    """The numbers of samples of runs on the side, those that operators were watched in first."""
    found, run = [], Measurement._run

    def counted(self, *args, **kwargs):
        found.append((self._flow is not None, self.samples))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Measurement, "_run", counted)
    return found


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_operators_tell_in_one_run_of_five_samples_and_one_of_six(runs, trace, training):
    model = normswap.convert(Net(), "cn", contexts=2, trace=trace, verify=False).train(training)
    for samples in (8, 10, 9):
        model(torch.randn(samples, 3, 8, 8), context=torch.arange(samples) % 2)
    assert runs == [(True, 5), (True, 6)]


def turned(x):
    return x.flip(0).flip(0)


def thrown(x):
    return F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("between", [turned, thrown])
def test_what_operators_do_not_tell_is_measured(runs, between):
    model = normswap.convert(Net(between), "cn", contexts=2, verify=False).eval()
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    x, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 2
    with torch.random.fork_rng():
        y = model(x, context=labels)
    assert [watched for watched, _ in runs].count(False) > 9
    if between is turned:
        alone = torch.cat([model(x[i : i + 1], context=labels[i : i + 1]) for i in range(8)])
        torch.testing.assert_close(y, alone)


def test_kernels_do_not_serve_what_is_watched(monkeypatch):
    asked = []

    def works(device, dtype):
        asked.append(torch._C._len_torch_dispatch_stack())
        return False

    monkeypatch.setattr(backend, "DEVICES", ("cpu",))
    monkeypatch.setattr(backend, "_works", works)
    model = normswap.convert(Net(), "cn", contexts=2, verify=False)
    model(torch.randn(8, 3, 8, 8), context=torch.arange(8) % 2)
    assert asked
    assert not any(asked)


def test_a_run_that_raises_leaves_no_mode():
    def raises(x):
        raise RuntimeError("of the user's")

    model = normswap.convert(Net(raises), "cn", contexts=2, verify=False)
    with pytest.raises(RuntimeError, match="of the user's"):
        model(torch.randn(8, 3, 8, 8), context=torch.arange(8) % 2)
    assert _get_current_dispatch_mode() is None
    assert not torch._C._len_torch_function_stack()
