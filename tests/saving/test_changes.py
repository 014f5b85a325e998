"""Converting reads a little of each weight; saving still tells what changed since."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normswap
from normswap import CheckpointError
from normswap.saving.folder import DESCRIPTION, FORMAT
from tests.support.models import make_inputs, make_model
from tests.support.saved import describe, make, rewrite, tensors_in

READ = 1021


class Wide(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(1000, 700)
        self.register_buffer("table", torch.arange(5000))
        self.to(dtype)
        self.register_buffer("phase", torch.randn(40, 50, dtype=torch.complex64))
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3))


def convert(base, **settings):
    return normswap.convert(base, "cn", contexts=2, verify=False, **settings)


class Reads(TorchDispatchMode):
    """Keep the sizes of what operators other than views take."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (
            func.namespace == "aten"
            and not func.is_view
            and func is not torch.ops.aten.take.default
        ):
            self.sizes += [t.numel() for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        elif func is torch.ops.aten.take.default:
            self.sizes.append(args[1].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_converting_reads_no_more_of_a_weight_than_a_sample(dtype):
    base = Wide(dtype).to(memory_format=torch.channels_last)
    with Reads() as reads:
        convert(base, inplace=True)
    assert base.fc.weight.numel() > max(reads.sizes) == READ


def written_under_no_grad(model):
    with torch.no_grad():
        model.fc.weight[123, 456] += 1


def written_by_data(model):
    model.fc.weight.data.add_(1e-3)


def one_row_by_data(model):
    model.fc.weight.data[321] += 1


def one_column_by_data(model):
    model.fc.weight.data[:, 21] += 1


def replaced(model):
    model.fc.weight = nn.Parameter(model.fc.weight.detach() + 1)


def replaced_in_a_row(model):
    weight = model.fc.weight.detach().clone()
    weight[7] = 0
    model.fc.weight.data = weight


def trained(model):
    torch.optim.SGD([model.fc.weight], 0.1).step(lambda: model.fc.weight.sum().backward())


CHANGES = [
    written_under_no_grad,
    written_by_data,
    one_row_by_data,
    one_column_by_data,
    replaced,
    replaced_in_a_row,
    trained,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_in_any_way_is_saved(change, tmp_path):
    base = Wide()
    model = convert(base)
    change(model)
    normswap.save(model, tmp_path)
    assert {n for n in tensors_in(tmp_path) if not n.startswith("bn.")} == {"fc.weight"}
    assert torch.equal(normswap.load(base, tmp_path).fc.weight, model.fc.weight)


def test_a_number_that_the_sample_misses_makes_the_base_another(tmp_path):
    base = Wide()
    model = convert(base)
    model.fc.weight.data[0, 1] += 1
    normswap.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"1 tensors have other values: fc\.weight"):
        normswap.load(base, tmp_path)
    normswap.save(model, tmp_path, state="all")
    assert torch.equal(normswap.load(base, tmp_path).fc.weight, model.fc.weight)


@pytest.mark.parametrize("change", [one_row_by_data, one_column_by_data, written_by_data])
def test_what_is_changed_in_a_copy_is_saved(change, tmp_path):
    base = Wide()
    model = copy.deepcopy(convert(base))
    change(model)
    normswap.save(model, tmp_path)
    assert {n for n in tensors_in(tmp_path) if not n.startswith("bn.")} == {"fc.weight"}


UNCHANGED = {
    "copied": copy.deepcopy,
    "its own state loaded": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())) and m,
    "its own state assigned": lambda m: (
        m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True) and m
    ),
    "in another dtype for a while": lambda m: (m.fc.double().float(), m)[1],
    "in another layout": lambda m: m.to(memory_format=torch.channels_last),
    "in shared memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("way", UNCHANGED)
def test_what_is_written_to_with_the_same_values_is_not_saved(way, tmp_path):
    base = Wide()
    normswap.save(UNCHANGED[way](convert(base)), tmp_path)
    assert all(name.startswith("bn.") for name in tensors_in(tmp_path))
    normswap.load(base, tmp_path)


def test_the_broadcast_of_data_parallel_training_is_no_change(tmp_path):
    base = Wide()
    model = convert(base)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        before = model.fc.weight._version
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert model.fc.weight._version > before
        normswap.save(wrapped, tmp_path)
    finally:
        torch.distributed.destroy_process_group()
    assert all(name.startswith("bn.") for name in tensors_in(tmp_path))


def test_a_loaded_model_saves_what_changed_since_its_base(tmp_path):
    base = Wide()
    model = convert(base)
    written_by_data(model)
    normswap.save(model, tmp_path)
    again = normswap.load(base, tmp_path)
    one_row_by_data(again)
    normswap.save(again, tmp_path / "again")
    assert "fc.weight" in tensors_in(tmp_path / "again")
    assert torch.equal(normswap.load(base, tmp_path / "again").fc.weight, again.fc.weight)


def test_norms_alone_of_a_trained_model_know_their_base_by_samples(tmp_path):
    base = Wide()
    model = convert(base)
    written_by_data(model)
    normswap.save(model, tmp_path, state="norms")
    assert set(describe(tmp_path)["samples"]) == {"fc.weight"}
    assert torch.equal(normswap.load(base, tmp_path).fc.weight, base.fc.weight)
    other = copy.deepcopy(base)
    one_row_by_data(other)
    with pytest.raises(CheckpointError, match=r"1 tensors have other values: fc\.weight"):
        normswap.load(other, tmp_path)


def test_a_folder_of_the_format_before_which_has_no_samples_is_loaded(tmp_path):
    base, model = make()
    normswap.save(model, tmp_path)
    rewrite(tmp_path, format=1, samples=None)
    assert torch.equal(normswap.load(base, tmp_path).neck.weight, model.neck.weight)
    rewrite(tmp_path, format=FORMAT)
    with pytest.raises(CheckpointError, match="expected 'samples' as checksums by name"):
        normswap.load(make_model(), tmp_path)


@pytest.mark.parametrize("method", ["cn", "cn-x"])
@pytest.mark.parametrize("where", ["layers", "base"])
def test_the_eps_of_layers_is_saved_with_them(tmp_path, method, where):
    base = make_model("ConvNet", torch.float64)
    model = normswap.convert(base, method, contexts=2).eval()
    x, labels = make_inputs(base), [0, 1, 0, 1, 0, 1]
    norms = [m for m in (model if where == "layers" else base).modules() if hasattr(m, "eps")]
    if where == "layers":
        for norm in norms:
            norm.eps = 0.5
    normswap.save(model, tmp_path)
    if where == "base":
        for norm in norms:
            norm.eps = 0.5
    loaded = normswap.load(base, tmp_path).eval()
    assert torch.equal(loaded(x, context=labels), model(x, context=labels))
    for back in (normswap.revert(model), normswap.specialize(model, 1)):
        torch.testing.assert_close(back(x), model(x, context=1))


def test_a_folder_that_tells_no_eps_is_read(tmp_path):
    base, model = make()
    normswap.save(model, tmp_path)
    content = describe(tmp_path)
    del content["eps"]
    (tmp_path / DESCRIPTION).write_text("{}")
    rewrite(tmp_path, **content)
    assert normswap.load(base, tmp_path).state_dict().keys() == model.state_dict().keys()
