"""What a launch hands to a program that was compiled before, without Triton's own look at it."""

import functools

import pytest
import torch

from normswap.functional.triton import launching
from normswap.functional.triton.launching import BoundLaunch, launches_for


class Kernel:
    """Stands for a kernel of Triton: counts how often it was asked, and what its programs got."""

    arg_names = ("x", "table", "count", "eps", "K", "BC")

    def __init__(self):
        self.asked, self.given, self.started = 0, [], []

    def __getitem__(self, grid):
        def run(*args, **meta):
            self.asked += 1
            self.given.append(args)
            return Program(self)

        return run


class Program:
    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel):
        self.kernel = kernel

    def run(self, x, y, z, stream, function, metadata, described, enter, leave, *values):
        """Take what Triton's own launch hands on."""
        assert (function, metadata) == ("function", "metadata")
        assert described is enter is leave is None
        self.kernel.started.append(((x, y, z), values))


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch):
    monkeypatch.setattr(launching, "_COMPILED", {})


def start(kernel, x, table=None, count=3, eps=1e-5, **more):
    launching.launch(kernel, 7, x, table, count, eps, **{"BC": 16, "K": 4, "num_warps": 8, **more})


def test_the_second_launch_starts_the_program_with_addresses_and_constants_in_order():
    kernel, x, table = Kernel(), torch.ones(8), torch.ones(4)
    start(kernel, x, table)
    start(kernel, x, table, eps=0.1)
    assert kernel.asked == 1
    values = (x.data_ptr(), table.data_ptr(), 3, 0.1, 4, 16)
    assert kernel.started == [((7, 1, 1), values)]


@pytest.mark.parametrize(
    "other",
    [
        {"table": None},
        {"x": torch.ones(8, dtype=torch.float16)},
        {"x": torch.ones(9)[1:]},  # not aligned to 16 bytes
        {"table": torch.ones(4, device="meta")},
        {"count": 1},
        {"count": 3.0},
        {"BC": 32},
        {"num_warps": 4},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_kind_of_arguments_is_compiled(other):
    kernel, given = Kernel(), {"x": torch.ones(8), "table": torch.ones(4)}
    start(kernel, **given)
    start(kernel, **{**given, **other})
    assert kernel.asked == 2
    assert not kernel.started


def test_a_tuple_stands_for_the_integers_it_holds():
    kernel, x = Kernel(), torch.ones(8)
    for eps in (0.1, 0.2):
        launching.launch(kernel, 7, x, None, (3, 4), eps, BC=16)
    assert kernel.given == [(x, None, 3, 4, 0.1)]
    assert kernel.started[0][1][:5] == (x.data_ptr(), None, 3, 4, 0.2)
    launching.launch(kernel, 7, x, None, (3, 5), 0.1, BC=16)
    assert kernel.asked == 2


@pytest.mark.parametrize("version", ["3.4.0", "3.10.0+git1", "4.0.0"])
def test_versions_of_triton_that_nobody_read_are_asked_each_time(monkeypatch, version):
    monkeypatch.setattr("triton.__version__", version)
    launching._takes_values.cache_clear()
    kernel, x = Kernel(), torch.ones(8)
    start(kernel, x)
    start(kernel, x)
    launching._takes_values.cache_clear()
    assert kernel.asked == 2


def test_old_programs_make_room(monkeypatch):
    monkeypatch.setattr(launching, "_MOST", 2)
    kernel, x = Kernel(), torch.ones(8)
    for count in (2, 3, 4, 2):
        start(kernel, x, count=count)
    assert kernel.asked == 4
    assert len(launching._COMPILED) == 2


def starts_of(kernel, count=3):
    return BoundLaunch(kernel, 7, (count, 1e-5), BC=16, K=4, num_warps=8)


def test_a_start_looks_at_its_first_tensors_alone():
    kernel = Kernel()
    start = starts_of(kernel)
    x, table = torch.ones(8), torch.ones(4)
    start(x, None)
    assert kernel.given == [(x, None, 3, 1e-5)]
    start(table, None)
    start(x, None)
    assert kernel.asked == 1
    assert [values for _, values in kernel.started] == [
        (table.data_ptr(), None, 3, 1e-5, 4, 16),
        (x.data_ptr(), None, 3, 1e-5, 4, 16),
    ]


def test_starts_of_the_same_kind_share_a_program():
    kernel = Kernel()
    for _ in range(2):
        starts_of(kernel)(torch.ones(8), None)
    assert kernel.asked == len(kernel.started) == 1


def test_a_start_asks_versions_of_triton_that_nobody_read_each_time(monkeypatch):
    monkeypatch.setattr(launching, "_takes_values", lambda: False)
    kernel = Kernel()
    start = starts_of(kernel)
    for _ in range(2):
        start(torch.ones(8), None)
    assert kernel.asked == 2


def test_what_is_kept_for_tensors_is_told_apart_by_their_kinds():
    made = []
    find = functools.lru_cache(lambda kinds, number: made.append(kinds) or len(made))
    x, half = torch.ones(8), torch.ones(8, dtype=torch.float16)
    assert launches_for((x, half), find, 1) == launches_for((x + 1, half), find, 1) == 1
    assert launches_for((x, half), find, 2) == 2
    assert launches_for((half, x), find, 1) == 3
    assert launches_for((x, half.to("meta")), find, 1) == 1  # the caller answers for devices
    assert launches_for((torch.empty(8, device="meta"), half), find, 1) == 4


def test_what_is_kept_is_told_apart_by_which_tensors_are_aligned():
    find = functools.lru_cache(lambda kinds: object())
    x, part = torch.ones(8), torch.ones(9)[1:]
    kinds = [(x, x), (x, part), (part, x), (part, part)]
    found = [launches_for(tensors, find) for tensors in kinds]
    assert len({*found}) == 4
    assert [launches_for(tensors, find) for tensors in kinds] == found
