"""`python -m recipes bench`: its timing, its memory, its table and what it refuses."""

import pytest
import torch
from torch import nn

from recipes import bench
from recipes.__main__ import main
from recipes.bench import interleave, peak_bytes

CPU = torch.device("cpu")


def test_cases_take_turns():
    seen = []
    cases = {name: lambda name=name: seen.append(name) for name in "ab"}
    timings = interleave(cases, CPU, repeats=3, warmup=1)
    assert seen == ["a", "b"] + ["a", "b"] * 3
    assert all(t.low <= t.median <= t.high for t in timings.values())


def test_peak_memory_counts_what_is_held_at_once():
    def one_after_another():
        for _ in range(4):
            torch.empty(2**20).fill_(1)

    def together():
        return [torch.empty(2**20).fill_(1) for _ in range(4)]

    assert peak_bytes(one_after_another, CPU) == pytest.approx(4 * 2**20, rel=0.01)
    assert peak_bytes(together, CPU) == pytest.approx(16 * 2**20, rel=0.01)


def test_a_row_for_the_model_and_for_each_method():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(4, 3, 8, 8)
    model(images)
    rows = bench.bench_model(model, ["cn", "acn"], images, contexts=2, repeats=1)
    assert [row[0] for row in rows] == [bench.BASE, "cn", "acn"]
    assert all(len(row) == len(bench.HEADINGS) for row in rows)
    assert rows[0][2] == rows[0][4] == rows[0][6] == "1.00"


def test_the_command_prints_the_table(capsys):
    arguments = "--model test_resnet --method cn-x --size 32 --batch 2 --repeats 1"
    assert main(["bench", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    assert "cn-x" in printed
    assert "medians" in printed
