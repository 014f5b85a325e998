"""What every method promises; subclass `Contract` with a fixture or parameter `method`."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.methods.layer import ContextLayer
from tests.builders import SKEWED, assert_close, random_
from tests.models import MODELS, make_inputs, make_model

FEW = 4
K = 3
MIXED = torch.tensor([2, 0, 1, 0, -1, 2])
ORDERS = [[2, 0, 1, 0, -1, 2], [0, 0, 1, 1, 2, 2], [2, 2, 1, 1, 0, -1], [1, 1, 1, 1, 1, 1]]
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
# What depends on how a context arrives: threaded through graphs, or in scope for own forwards.
BOTH_WAYS = pytest.mark.parametrize("trace", [True, False], ids=["threaded", "scoped"])


def convert(model, method, **settings):
    return normswap.convert(model, method, **{"contexts": K, "priors": SKEWED, **settings})


def separate(model, seed=0):
    """Give every context its own random statistics and affine."""
    layers = [m for m in model.modules() if isinstance(m, ContextLayer)]
    for layer in layers:
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point() and tensor.dim() == 2:
                seed += 1
                offset = random_(torch.empty_like(tensor), seed, 0, 0.7)
                with torch.no_grad():
                    tensor.add_(offset)
    assert layers
    return model


@functools.cache
def _separated(method, name, settings):
    return separate(convert(make_model(name, torch.float64), method, **dict(settings)))


def separated(method, name="ConvNet", **settings):
    """Return a converted float64 model in eval mode, whose contexts differ."""
    return copy.deepcopy(_separated(method, name, tuple(settings.items())))


class Contract:
    @EVERY_MODEL
    @pytest.mark.parametrize("unknown", ["pooled", "posterior", "1", "error"])
    def test_function_is_kept_to_float32_rounding(self, method, name, unknown):
        model = make_model(name)
        x = make_inputs(model)
        wide = make_model(name, torch.float64)(x.double())
        bound = FEW * float((model(x) - wide).detach().abs().max())
        converted = convert(model, method, unknown=unknown)
        for labels in (0, 1, 2, MIXED.clamp(min=0), MIXED, None):
            if unknown == "error" and (labels is None or labels is MIXED):
                continue
            error = float((converted(x, context=labels) - wide).detach().abs().max())
            assert error <= bound

    @EVERY_MODEL
    def test_input_gradient_is_kept(self, method, name):
        model = make_model(name, torch.float64)
        x = make_inputs(model).requires_grad_()
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
        converted = convert(model, method)
        (actual,) = torch.autograd.grad(converted(x, context=MIXED).square().sum(), x)
        assert_close(actual, expected, 1e-10)

    @BOTH_WAYS
    @EVERY_MODEL
    @pytest.mark.parametrize("labels", ORDERS)
    def test_mixed_batch_equals_its_samples_one_by_one(self, method, name, labels, trace):
        model, labels = separated(method, name, trace=trace), torch.tensor(labels)
        x = make_inputs(model)
        alone = [model(x[n : n + 1], context=labels[n : n + 1]) for n in range(len(x))]
        assert_close(model(x, context=labels), torch.cat(alone))

    @EVERY_MODEL
    def test_contexts_differ_once_separated(self, method, name):
        model = separated(method, name)
        x = make_inputs(model)
        outputs = [model(x, context=k) for k in range(K)]
        for k in range(K):
            assert float((outputs[k] - outputs[k - 1]).detach().abs().amax(1).min()) > 1e-4

    @BOTH_WAYS
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", ["ConvNet", "Windows"])
    def test_permutation_equivariance(self, method, name, training, trace):
        model = separated(method, name, trace=trace).train(training)
        x, order = make_inputs(model), torch.tensor([4, 2, 0, 5, 1, 3])
        expected = copy.deepcopy(model)(x, context=MIXED)[order]
        assert_close(model(x[order], context=MIXED[order]), expected)

    @BOTH_WAYS
    @EVERY_MODEL
    def test_labels_in_scope_do_what_labels_given_do(self, method, name, trace):
        model = separated(method, name, trace=trace)
        x = make_inputs(model)
        expected = model(x, context=MIXED)
        with normswap.use_context(model, MIXED):
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x, context=MIXED.flip(0)), model(x, context=MIXED.flip(0)))
            assert not torch.equal(model(x, context=MIXED.flip(0)), expected)
        assert torch.equal(model(x), model(x, context=[-1] * len(x)))

    @BOTH_WAYS
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_recomputes_with_the_labels_of_its_forward(
        self, method, reentrant, trace
    ):
        model = separated(method, trace=trace).train()
        twin, labels = copy.deepcopy(model), MIXED.clamp(min=0)
        x = make_inputs(model).requires_grad_()

        def run(labels):
            return checkpoint(lambda v: twin(v, context=labels), x, use_reentrant=reentrant)

        pairs = [(model(x, context=k), run(k)) for k in (labels, labels.flip(0))]
        for expected, actual in pairs:
            assert_close(actual, expected)
        for outputs in zip(*pairs, strict=True):
            sum(y.square().sum() for y in outputs).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert_close(q.grad, p.grad, 1e-10)

    def test_renaming_the_contexts_changes_nothing(self, method):
        model = separated(method)
        x, order = make_inputs(model), torch.tensor([1, 2, 0])
        expected = model(x, context=MIXED.clamp(min=0))
        for layer in model.modules():
            if isinstance(layer, ContextLayer):
                for key, tensor in layer.state_dict().items():
                    if tensor.dim() == 2 or key == "priors":
                        tensor.copy_(tensor[order])
        assert_close(model(x, context=torch.argsort(order)[MIXED.clamp(min=0)]), expected)

    def test_one_context_needs_no_label_and_equals_the_base(self, method):
        model = make_model(dtype=torch.float64)
        x = make_inputs(model)
        converted = normswap.convert(model, method)
        assert_close(converted(x), model(x))
        assert_close(converted(x, context=0), model(x))

    @BOTH_WAYS
    def test_one_training_step_reaches_every_present_context_alone(self, method, trace):
        model = separated(method, trace=trace).train()
        x, labels = make_inputs(model), torch.tensor([0, 2, 2, 0, 0, 2])
        model(x, context=labels).square().sum().backward()
        for layer in model.modules():
            if isinstance(layer, ContextLayer):
                for parameter in layer.parameters():
                    grad = parameter.grad
                    if grad.dim() == 2:
                        assert grad[[0, 2]].abs().sum(1).min() > 0
                        assert grad[1].abs().max() == 0

    @BOTH_WAYS
    def test_deepcopy_is_equal_and_independent(self, method, trace):
        model = separated(method, trace=trace)
        x = make_inputs(model)
        expected = model(x, context=MIXED)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x, context=MIXED), expected)
        separate(twin, seed=99)
        assert torch.equal(model(x, context=MIXED), expected)
        assert not torch.equal(twin(x, context=MIXED), expected)

    @BOTH_WAYS
    @EVERY_MODEL
    def test_pickle(self, method, name, trace):
        model = separated(method, name, trace=trace)
        x = make_inputs(model)
        twin = pickle.loads(pickle.dumps(model))
        assert type(twin) is type(model)
        assert torch.equal(twin(x, context=MIXED), model(x, context=MIXED))

    def test_state_dict_saves_and_loads(self, method):
        model, file = separated(method), io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        twin = convert(make_model(dtype=torch.float64), method, priors=None)
        twin.load_state_dict(torch.load(file, weights_only=True))
        x = make_inputs(model)
        for labels in (MIXED, None):
            assert torch.equal(twin(x, context=labels), model(x, context=labels))

    def test_base_checkpoint_loads_after_training(self, method):
        base = make_model(dtype=torch.float64)
        model, x = separated(method), make_inputs(base)
        model.load_state_dict(base.state_dict())
        assert_close(model(x, context=MIXED), base(x))

    def test_keys_of_what_was_not_replaced_stay(self, method):
        base = make_model()
        kept = {k for k in base.state_dict() if k.startswith(("head", "stem.0", "blocks.0.conv"))}
        assert kept <= set(convert(base, method).state_dict())

    def test_modes_survive_conversion_and_switch(self, method):
        base = make_model().train()
        base.stem[1].eval()
        model = convert(base, method)
        assert [model.training, model.stem[1].training, model.neck.training] == [True, False, True]
        assert not any(m.training for m in model.eval().modules())
        assert all(m.training for m in model.train().modules())

    def test_norms_in_eval_mode_keep_their_state_while_the_rest_trains(self, method):
        model = separated(method).train()
        for layer in model.modules():
            if isinstance(layer, ContextLayer):
                layer.eval().requires_grad_(False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        x = make_inputs(model)
        model(x, context=MIXED).square().sum().backward()
        assert model.head.weight.grad is not None
        assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())

    def test_parameters_are_visible_to_an_optimizer_and_move(self, method):
        model = separated(method).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        x = make_inputs(model)
        model(x, context=MIXED.clamp(min=0)).square().sum().backward()
        optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert {n for n in before if n.startswith(("stem.1", "neck"))} <= moved

    @BOTH_WAYS
    @pytest.mark.parametrize("training", [True, False])
    def test_compiles_into_one_graph(self, method, training, trace):
        torch._dynamo.reset()
        model = separated(method, "Windows", trace=trace).train(training)
        x = make_inputs(model)
        model(x, context=MIXED)  # measures which rows are whose, as a compiled run cannot
        twin = copy.deepcopy(model)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x, context=MIXED), model(x, context=MIXED))
        assert_close(compiled(x, context=MIXED.flip(0)), model(x, context=MIXED.flip(0)))
        for actual, expected in zip(twin.buffers(), model.buffers(), strict=True):
            assert_close(actual, expected)

    @BOTH_WAYS
    @pytest.mark.parametrize("unknown", ["pooled", "posterior"])
    def test_exports_with_the_context_as_an_input(self, method, unknown, trace):
        model = separated(method, "Windows", unknown=unknown, trace=trace)
        x = make_inputs(model)
        model(x, context=MIXED)  # measures which rows are whose
        program = torch.export.export(model, (x,), {"context": MIXED}).module()
        for labels in (MIXED, MIXED.flip(0)):
            assert_close(program(x, context=labels), model(x, context=labels))

    def test_summary_finds_contexts_apart_only_once_separated(self, method):
        model = convert(make_model(), method)
        rows = [r for r in normswap.summary(model).rows if r.action == "replaced"]
        assert len(rows) == 4
        assert all(r.divergence is None or r.divergence < 1e-6 for r in rows)
        for row in normswap.summary(separate(model)).rows:
            assert row.divergence is None or row.divergence > 1e-4

    def test_plan_on_a_model_without_values(self, method):
        with torch.device("meta"):
            model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        assert normswap.plan(model, method, contexts=K).count(action="replaced") == 1
