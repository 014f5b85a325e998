"""What callees do to the lists and dicts of a forward: never lost, whoever they are."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normswap
from tests.support.behave import LABELS, Block, Holder, call, check, close, images


class Push(nn.Module):
    """Appends to the list it is given."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, found):
        found.append(self.block(x))
        return x * 2


class Along(nn.Module):
    """Changes the dict it is given and returns it, as dict-style frameworks do."""

    def __init__(self, key):
        super().__init__()
        self.block, self.key = Block(), key

    def forward(self, batch):
        batch[self.key] = self.block(batch["x"])
        return batch


def threaded(converted):
    assert not normswap.summary(converted).opaque


def test_a_list_that_starts_empty():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.push = Push()

        def forward(self, x):
            found = []
            y = self.push(self.a(x), found)
            return self.b(y) + found[0] * len(found)

    check(Model(), opaque="hands a list or dict to a Push that may change it")


def test_a_dict_passed_along_a_sequential():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.steps = nn.Sequential(Along("p"), Along("x"), Along("q"))

        def forward(self, x):
            batch = {"x": x}
            same = self.steps(batch)
            assert same is batch
            return self.a(batch["x"]) + same["p"] * same["q"] + len(batch)

    converted = check(Model(), opaque="hands a list or dict to a Sequential")
    why = normswap.summary(converted).opaque["steps.0"]
    assert why == "changes a list or dict it is given"


def test_the_callers_own_dict_comes_back():
    model = nn.Sequential(Along("p"), Along("x")).eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    mine, theirs = {"x": images()}, {"x": images()}
    assert converted(mine, context=LABELS) is mine
    model(theirs)
    assert list(mine) == list(theirs) == ["x", "p"]
    close(list(mine.values()), list(theirs.values()))


def test_a_list_that_comes_back_in_a_tuple():
    class Both(Push):
        def forward(self, x, found):
            found.append(self.block(x))
            return x * 2, found

    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.one, self.two = Both(), Both()

        def forward(self, x):
            found = []
            x, same = self.one(x, found)
            x, again = self.two(x, same)
            return self.a(x) + sum(found) * len(again)

    check(Model(), opaque="hands a list or dict to a Both")


def test_one_list_given_twice():
    class Twice(Push):
        def forward(self, one, other):
            one.append(self.block(one[0]))
            return other[-1] * 2

    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.twice = Twice()

        def forward(self, x):
            found = [x]
            y = self.twice(found, found)
            return self.a(y) + found[-1] * len(found)

    check(Model(), opaque="hands a list or dict to a Twice")
    model = Twice().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    mine, theirs = [images()], [images()]
    close(call(converted, (mine, mine), context=LABELS), call(model, (theirs, theirs)))
    close(mine, theirs)


@pytest.mark.parametrize("give", [lambda x, f: {"x": x, "f": f}, lambda x, f: ((x, f), 1)])
def test_a_list_inside_another_argument(give):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, given):
            x, found = given.values() if isinstance(given, dict) else given[0]
            found.append(self.block(x))
            return x * 2

    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            found = []
            y = self.inner(self.give(self.b(x), found))
            return self.a(y) + len(found)

    Model.give = staticmethod(give)
    check(Model(), opaque="may change it")


@pytest.mark.parametrize("change", ["append", "replace", "return"])
def test_a_module_without_norms_that_changes_its_list(change):
    class Leaf(nn.Module):
        def forward(self, found):
            if change == "append":
                found.append(found[0] * 2)
            elif change == "replace":
                found[0] = found[0] * 2
            return found if change == "return" else found[0]

    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.leaf = Leaf()

        def forward(self, x):
            found = [x, self.a(x)]
            y = self.leaf(found)
            if change == "return":
                y.append(x)
                y = y[0]
            return self.b(y + found[0]) * len(found)

    check(Model(), opaque="hands a list or dict to a Leaf that may change it")


def _collect(x, found):
    found.append(x.mean((2, 3), keepdim=True))


def _double(batch):
    batch["x"] = batch["x"] * 2
    return batch


def _same(found):
    return found


def test_functions_that_change_or_give_back_their_lists():
    class Model(Holder):
        def forward(self, x):
            found, batch = [], {"x": self.a(x)}
            _collect(x, found)
            other = _double(batch)
            same = _same(found)
            same.append(self.b(batch["x"]))
            return sum(found) * len(found) + other["x"]

    check(Model())


def test_a_method_that_changes_an_attribute_and_its_list():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.calls = [0]

        def push(self, x, found):
            self.calls[0] += 1
            found.append(self.b(x))

        def forward(self, x):
            found = []
            y = self.a(x)
            self.push(y, found)
            return y + sum(found) * len(found)

    check(Model(), opaque="reads .calls, a list")


class Noted(Holder):
    """Its methods change an attribute."""

    def __init__(self):
        super().__init__()
        self.calls = [0]

    def note(self):
        self.calls[0] += 1


def test_none_from_a_method():
    class Model(Noted):
        def maybe(self, x):
            self.calls[0] = 1
            return None if x.shape[2] == 6 else x

        def forward(self, x):
            y = self.maybe(self.a(x))
            return self.b(x) if y is None else self.b(y) * 2

    check(Model(), opaque="reads .calls, a list")


def test_a_generator_that_sets_what_was_set_before():
    class Model(Noted):
        def parts(self, x):
            self.calls[0] = 1
            for block in (self.a, self.b):
                x = block(x)
                yield x

        def forward(self, x):
            return sum(self.parts(x))

    check(Model(), opaque="reads .calls, a list")


def test_a_method_in_a_checkpointed_part():
    class Model(Noted):
        def part(self, x):
            self.calls[0] = 1
            return self.b(x) if x.mean() < 9 else x

        def forward(self, x):
            return checkpoint(self.part, self.a(x), use_reentrant=False) * 1.5

    check(Model(), opaque="calls torch.utils.checkpoint.checkpoint()")


@functools.lru_cache
def _twice(size):
    return size * 2


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda n: 2 if n in {6, 8} else 3, "in a set, dict or cache"),
        (lambda n: {6: 2, 8: 3}.get(n, 5), "in a set, dict or cache"),
        (_twice, "a _lru_cache_wrapper, which may have changed"),
    ],
    ids=["set", "dict", "cache"],
)
def test_a_size_looked_up(ask, reason):
    class Model(Holder):
        def forward(self, x):
            return self.b(self.a(x) * self.ask(x.shape[2]))

    Model.ask = staticmethod(ask)
    check(Model(), opaque=reason)
    check(Model(), torch.nn.functional.interpolate(images(), (8, 6)), opaque=reason)
