"""Lists and dicts that a forward is given and changes."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normswap
from tests.support.behave import CHANNELS, LABELS, Block, Holder, call, check, close, images


class Append(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x, found):
        found.append(self.first(x))
        found.append(self.second(found[-1]))
        return found[-1] * 2


class Add(Append):
    def forward(self, x, found):
        found["first"] = self.first(x)
        found["out"] = found["out"] + self.second(found["first"])
        return found["out"]


def test_a_list_a_child_appends_to():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.append = Append()

        def forward(self, x):
            found = [x]
            y = self.append(self.a(x), found)
            return self.b(y) + torch.stack(found).sum(0) * len(found)

    check(Model(), opaque="hands a list or dict to a Append that may change it")


def test_a_dict_a_child_fills():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.add = Add()

        def forward(self, x):
            found = {"out": x}
            self.add(self.a(x), found=found)
            return self.b(sum(found.values()))

    check(Model(), opaque="hands a list or dict to a Add that may change it")


def test_the_callers_own_list_is_changed():
    model = Append().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    mine, theirs = [images()], [images()]
    close(call(converted, (images(), mine), context=LABELS), call(model, (images(), theirs)))
    close(mine, theirs)
    assert len(mine) == 3


def test_a_list_that_a_leaf_changes_is_never_misread():
    class Leaf(nn.Module):
        def forward(self, x, found):
            found.append(x)
            return x

    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.leaf = Leaf()

        def forward(self, x):
            found = [x]
            self.leaf(self.a(x), found)
            return self.b(torch.stack(found).sum(0)) * len(found)

    check(Model(), opaque="hands a list or dict to a Leaf that may change it")


def test_a_list_a_child_only_reads():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.mix = nn.Identity()
            self.fuse = Fuse()

        def forward(self, x):
            found = [x, self.a(x)]
            return self.fuse(found) + found[1]

    class Fuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, parts):
            parts = list(parts)
            last = parts.pop()
            return self.norm(last + sum(parts))

    check(Model(), opaque="hands a list or dict to a Fuse that may change it")


def test_a_list_a_child_appends_to_in_training_only():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, found):
            y = self.norm(found[0])
            if self.training:
                found.append(y)
            return y

    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.part = Part()

        def forward(self, x):
            found = [self.a(x)]
            return self.b(self.part(found)) * len(found)

    model = Model().eval()
    converted = normswap.convert(model, "cn", verify=False)
    for mode in (False, True, False):
        for one in (model, converted):
            one.train(mode)
        close(call(converted, (images(),)), call(model, (images(),)))


def test_a_list_changed_inside_a_checkpointed_part():
    class Model(Holder):
        def forward(self, x):
            found = [x]

            def part(y, kept):
                kept.append(y)
                return self.a(y)

            y = checkpoint(part, x, found, use_reentrant=False)
            return self.b(y) * len(found)

    check(Model(), opaque="calls torch.utils.checkpoint.checkpoint()")


def test_a_recomputation_that_stops_early_changes_what_the_original_changes():
    seen = []

    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, x, seen=seen):
            seen.append(1)
            return self.norm(x) + 1

    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.count = Count()

        def forward(self, x):
            return self.b(checkpoint(self.count, x, use_reentrant=False))

    converted = normswap.convert(Model(), "cn", contexts=3, verify=False)
    for run in (Model(), lambda x: converted(x, context=LABELS)):
        seen.clear()
        run(images().requires_grad_()).sum().backward()
        assert len(seen) == 2


def test_a_list_that_is_handed_back():
    class Back(Holder):
        def forward(self, x, found):
            return self.b(self.a(x)), found

    converted = normswap.convert(Back().eval(), "cn", contexts=3, verify=False)
    mine = [images()]
    assert converted(images(), mine, context=LABELS)[1] is mine
    assert "returns a list or dict it was given" in normswap.summary(converted).opaque[""]
