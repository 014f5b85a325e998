"""Branches on what only a run knows: the forward is scoped, and each run takes its own."""

import copy
import pickle

import pytest
import torch

import normswap
from tests.support.behave import CHANNELS, LABELS, Block, Holder, call, check, close, images


def sized(height, scale=1.0):
    return torch.nn.functional.interpolate(images(), (height, 6)) * scale


def check_all(model, *inputs, why="branches on a value"):
    """Check one converted model on inputs that take different branches."""
    model = model.eval()
    expected = [call(model, (x,)) for x in inputs]
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    for x, y in zip(inputs, expected, strict=True):
        close(call(converted, (x,), context=LABELS), y)
    for x in inputs:
        check(copy.deepcopy(model), x, opaque=why)
    model.train()
    converted.train()
    for x in inputs:
        close(call(converted, (x,), context="0"), call(model, (x,)))
    return converted


class Shapes(Holder):
    def forward(self, x):
        y = self.a(x)
        if y.shape[2] == 6:
            y = self.b(y)
        elif y.shape[2] > 6 and y.shape[3] == 6:
            y = y[:, :, ::2] * 3
        return y - 1


class Values(Holder):
    def forward(self, x):
        if x.mean() > 9:
            return self.a(x)
        return self.b(self.a(x)) if self.a(x).mean() < 50 else x


def test_branches_on_shapes():
    check_all(Shapes(), sized(6), sized(8), sized(4))


def test_branches_on_values():
    check_all(Values(), images(), images() + 20, images() - 5)


def test_a_branch_is_taken_anew_after_a_copy():
    converted = check_all(Shapes(), sized(6), sized(8)).eval()
    for copied in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        for x in (sized(8), sized(6), sized(4)):
            close(call(copied, (x,), context=LABELS), call(converted, (x,), context=LABELS))


def test_branches_compile():
    converted = check_all(Shapes(), sized(6), sized(8)).eval()
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    for x in (sized(8), sized(6), sized(4)):
        close(call(compiled, (x,), context=LABELS), call(converted, (x,), context=LABELS))


def test_errors_of_the_forward_stay_its_own():
    class Model(Holder):
        def forward(self, x):
            assert x.shape[1] == CHANNELS, f"got {x.shape[1]} channels"
            y = self.a(x)
            if y.shape[2] != 6:
                raise ValueError(f"expected height 6, got {y.shape[2]}")
            return self.b(y)

    converted = check(Model(), opaque="branches on a value")
    with pytest.raises(AssertionError, match="got 5 channels"):
        converted(torch.zeros(4, 5, 6, 6), context=LABELS)
    with pytest.raises(ValueError, match="expected height 6, got 8"):
        converted(sized(8), context=LABELS)


def test_a_forward_that_raises_has_moved_the_statistics_once():
    class Model(Holder):
        def forward(self, x):
            y = self.a(x)
            if y.shape[2] != 6:
                raise ValueError("too large")
            return self.b(y)

    model = Model().train()
    converted = normswap.convert(model, "cn", verify=False)
    for one in (model, converted):
        with pytest.raises(ValueError, match="too large"):
            one(sized(8))
    for before, after in ((model.a.norm, converted.a.norm), (model.b.norm, converted.b.norm)):
        assert after.num_batches_tracked.item() == before.num_batches_tracked.item()
        torch.testing.assert_close(after.running_mean[0], before.running_mean)


def test_a_branch_that_cannot_be_traced_runs_as_it_was_written():
    class Model(Holder):
        def forward(self, x):
            if x.shape[2] == 6:
                return self.a(x)
            rows = [self.b(row[None]) for row in x]
            return torch.cat(rows)

    check_all(Model(), sized(6))
    model = Model().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    close(call(converted, (sized(8),), context="1"), call(model, (sized(8),)))


def test_a_branch_that_cannot_be_traced_after_a_norm_leaves_the_whole_forward():
    class Model(Holder):
        def forward(self, x):
            y = self.a(x)
            return self.b(y) if y.shape[2] == 6 else torch.cat([row[None] for row in y])

    check(Model(), opaque="branches on a value")


def test_loops_end_where_the_run_ends_them():
    class Model(Holder):
        def forward(self, x):
            while x.shape[2] > 6:
                x = self.a(x)[:, :, ::2]
            return self.b(x)

    check(Model(), sized(6), opaque="branches on a value")


def test_more_branches_than_are_traced():
    class Model(Holder):
        def forward(self, x):
            for step in range(12):
                if x.mean() > step:
                    x = self.a(x)
            return self.b(x)

    check(Model(), opaque="branches on a value")


def test_layers_dropped_at_random_are_drawn_in_every_run():
    class Model(Holder):
        def forward(self, x):
            return self.b(self.a(x)) if torch.rand(()) < 0.5 else self.b(x)

    model = Model().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        expected = call(model, (images(),))
        torch.manual_seed(seed)
        close(call(converted, (images(),), context=LABELS), expected)
        seen.add(float(expected[0].sum()))
    assert len(seen) == 2


def test_the_type_of_what_a_child_returns():
    class Two(Block):
        def forward(self, x):
            y = super().forward(x)
            return [y, x] if x.shape[2] == 6 else y

    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            y = self.two(x)
            if isinstance(y, list | tuple):
                y = y[0] * 2
            return self.b(y)

    check_all(Model(), sized(6), sized(8), why="asks for the type of a value")


def test_a_question_asked_twice_has_one_answer():
    class Model(Holder):
        def forward(self, x):
            y = self.a(x)
            for _ in range(20):
                y = y * 0.9 if x.shape[2] % 2 == 0 else y + 1
            return self.b(y)

    check_all(Model(), sized(6), sized(7))


def test_a_shape_changed_in_place_is_asked_for_again():
    class Model(Holder):
        def forward(self, x):
            y = self.a(x).sum((2, 3))
            while y.dim() < 4:
                y.unsqueeze_(-1)
            return self.b(y.expand(-1, -1, 6, 6))

    check(Model(), opaque="branches on a value")


def test_no_layer_is_inserted_where_a_forward_branches():
    class Model(Holder):
        def forward(self, x):
            if x.shape[2] == 6:
                return torch.relu(self.b(x) + x)
            return torch.cat([row[None] for row in x])

    rows = normswap.plan(Model().eval(), "selfnorm", placement="post").rows
    reasons = {row.fqn: row.reason for row in rows if row.action == "refused"}
    assert reasons == {"": "it branches on a value that is known only when it runs"}


def test_text_of_a_value_that_is_used():
    class Model(Holder):
        def forward(self, x):
            return self.b(self.a(x)) * len(f"{x.shape[2]}")

    check(Model(), opaque="writes, as text, a value known only when it runs")
