"""The mixture functions against float64 loops, scikit-learn and each other."""

import warnings

import numpy as np
import pytest
import torch

from normswap.functional import mixture, mixture_fused
from normswap.functional.mixture import Mixture, norm_positions, responsibilities
from normswap.functional.mixture_fit import fit_mixture
from normswap.functional.mixture_fused import norm_elements
from normswap.functional.mixture_instances import norm_instances
from normswap.functional.mixture_start import bounded_log_prior, bounded_log_sigma, free_logits
from normswap.functional.moments import Moments
from tests.support.builders import assert_close, make_batch, random_
from tests.support.mixture_oracle import acn

NORMS = {"channel": norm_elements, "position": norm_positions, "instance": norm_instances}
SHAPES = [(9, 3), (4, 3, 5), (3, 3, 2, 3), (1, 3, 4, 2)]
K, C, EPS = 3, 3, 1e-3


def make_tables(assignment="channel", count=K, channels=C):
    """Return weight, bias, logits, mu, log sigma, mean, var with random values."""
    columns = 1 if assignment == "position" else channels
    sizes = [(channels,), (channels,), (count, columns), *[(count, channels)] * 4]
    ranges = [(0.5, 1.5), (-1, 1), (-1, 1), (-1, 2), (-0.3, 0.5), (-1, 2), (0.5, 2)]
    tables = []
    for seed, (size, (low, high)) in enumerate(zip(sizes, ranges, strict=True)):
        table = random_(torch.empty(size, dtype=torch.float64), seed, low, high)
        tables.append(table.requires_grad_())
    return tables


def run(norm, x, tables, batch, eps=EPS):
    weight, bias, logits, mu, log_sigma, mean, var = tables
    log_prior = bounded_log_prior(logits)
    gain = weight * torch.exp(-0.5 * log_prior)
    gain = gain.expand_as(mu)
    if norm is not norm_positions:
        log_prior = log_prior.expand_as(mu)
    given = Moments(mean, var)
    return norm(x, Mixture(log_prior, mu, log_sigma), gain, bias, given, eps, batch)


def gradients(y, tensors):
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    found = torch.autograd.grad(y, tensors, cotangent, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("assignment", NORMS)
def test_output_moments_and_every_gradient_equal_the_loop(assignment, shape, batch):
    tables, x = make_tables(assignment), make_batch(shape).requires_grad_()
    result = run(NORMS[assignment], x, tables, batch)
    given = None if batch else tables[5:]
    y, mean, var = acn(x, *tables[:5], assignment, given, EPS)
    assert_close(result.y, y)
    assert_close(result.moments.mean, mean)
    assert_close(result.moments.var, var)
    tensors = [x, *tables[: 5 if batch else 7]]
    for actual, expected in zip(gradients(result.y, tensors), gradients(y, tensors), strict=True):
        assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("batch", [True, False])
def test_blocks_of_channels_equal_the_plain_formula(monkeypatch, batch):
    tables = make_tables(channels=7)
    x = make_batch((4, 7, 5)).requires_grad_()
    plain = run(mixture.norm_elements_by_formula, x, tables, batch)
    tensors = [x, *tables[: 5 if batch else 7]]
    expected = gradients(plain.y, tensors)
    for block in (1, 3 * 4 * 5 * 2, 10**6):
        monkeypatch.setitem(mixture_fused._BLOCK, "cpu", block)
        result = run(norm_elements, x, tables, batch)
        assert_close(result.y, plain.y)
        for actual, other in zip(gradients(result.y, tensors), expected, strict=True):
            assert_close(actual, other)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("assignment", NORMS)
def test_gradcheck_first_and_second_order(assignment, batch):
    tables = make_tables(assignment, 2, 2)
    x = make_batch((3, 2, 2)).requires_grad_()

    def function(x, *tables):
        return run(NORMS[assignment], x, [*tables, *given], batch).y

    given = tables[5:] if not batch else [t.detach() for t in tables[5:]]
    assert torch.autograd.gradcheck(function, (x, *tables[:5]))
    assert torch.autograd.gradgradcheck(function, (x, *tables[:5]))


@pytest.mark.parametrize("kind", ["channel", "position"])
def test_responsibilities_equal_scikit_learns(kind):
    from sklearn.mixture import GaussianMixture

    joint = kind == "position"
    x = make_batch((20, C))
    *_, logits, mu, log_sigma, _, _ = (t.detach() for t in make_tables(kind))
    tau = responsibilities(x, Mixture(bounded_log_prior(logits), mu, log_sigma), joint)
    for c in [slice(None)] if joint else [slice(i, i + 1) for i in range(C)]:
        model = GaussianMixture(K, covariance_type="diag")
        model.weights_ = bounded_log_prior(logits)[:, 0 if joint else c].exp().numpy().reshape(K)
        model.means_ = mu[:, c].numpy()
        model.covariances_ = (2 * log_sigma[:, c]).exp().numpy()
        model.precisions_cholesky_ = 1 / np.sqrt(model.covariances_)
        expected = torch.from_numpy(model.predict_proba(x[:, c].numpy())).T
        assert_close(tau[:, :, 0 if joint else c].reshape(K, -1), expected)


@pytest.mark.parametrize("joint", [True, False])
def test_tails_are_assigned(joint):
    x = torch.tensor([[-1e4, 1e4], [3e3, -2e3]])
    mean = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    log_prior = torch.full((2, 1), 0.5).log()
    tables = Mixture(log_prior.expand(2, 1 if joint else 2), mean, torch.zeros(2, 2))
    tau = responsibilities(x, tables, joint)
    assert_close(tau.sum(0), torch.ones_like(tau[0]))
    if joint:
        assert_close(tau[1].flatten(), torch.tensor([0.5, 1.0]))
    else:
        assert_close(tau[1], (x > 0).float())


@pytest.mark.parametrize("assignment", NORMS)
def test_a_component_without_values_takes_the_given_moments(assignment):
    tables = make_tables(assignment)
    with torch.no_grad():
        tables[3][2] = 1e3
    x = make_batch((6, C, 4)).requires_grad_()
    result = run(NORMS[assignment], x, tables, True)
    assert_close(result.mass[2].expand(C), torch.zeros(C, dtype=torch.float64))
    assert_close(result.moments.mean[2], tables[5][2])
    assert_close(result.moments.var[2], tables[6][2])
    assert all(g.isfinite().all() for g in gradients(result.y, [x, *tables[:5]]))


@pytest.mark.parametrize("assignment", NORMS)
def test_a_large_common_mean_costs_no_more_digits_than_its_own_rounding(assignment):
    tables = [t.detach() for t in make_tables(assignment)]
    x = make_batch((8, C, 40))
    exact = run(NORMS[assignment], x.float().double() + 1000, shifted(tables, 1000), True).y
    narrow = run(
        NORMS[assignment], (x.float() + 1000), [t.float() for t in shifted(tables, 1000)], True
    ).y
    # float32 spaces values near 1000 by 6e-5, against a standard deviation near 1.
    assert float((exact - narrow).abs().max()) < 1e-3


def shifted(tables, offset):
    return [t + offset if i in (3, 5) else t for i, t in enumerate(tables)]


def saved_bytes(norm, count):
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    tables = make_tables("position" if norm is norm_positions else "channel", count, 8)
    x = torch.randn(8, 8, 32, 32, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run(norm, x, tables, True)
    assert result.y.requires_grad
    return sum(found.values()) / (x.numel() * x.element_size())


def test_what_is_saved_for_backward_does_not_grow_with_the_components():
    few, many = saved_bytes(norm_elements, 2), saved_bytes(norm_elements, 16)
    assert few < 1.01
    assert many < 1.05
    assert saved_bytes(mixture.norm_elements_by_formula, 16) > 16
    # Instances and positions keep K values for one of x's rows, not for each of its values.
    for norm in (norm_instances, norm_positions):
        assert saved_bytes(norm, 16) < saved_bytes(norm, 2) + 14 * 4 / 8


def test_lambda_and_sigma_are_bounded():
    logits = torch.tensor([[200.0], [-200.0], [0.0]], requires_grad=True)
    priors = bounded_log_prior(logits).exp()
    assert float(priors.detach().min()) >= 0.0099 / 3
    assert_close(priors.sum(0), torch.ones(1), 1e-6)
    log_sigma = bounded_log_sigma(torch.tensor([-100.0, 0.0, 100.0]), 1e-5)
    assert_close(log_sigma.exp()[:2], torch.tensor([1e-5**0.5, 1.0]), 1e-6)
    assert float((2 * log_sigma[2]).exp()) < torch.inf
    wanted = torch.tensor([[0.7], [0.2], [0.1]])
    assert_close(bounded_log_prior(free_logits(wanted)).exp(), wanted, 1e-6)


@pytest.mark.parametrize("joint", [True, False])
def test_fit_finds_what_scikit_learn_finds(joint):
    from sklearn.mixture import GaussianMixture

    generator = torch.Generator().manual_seed(0)
    which = torch.rand(2000, generator=generator) < 0.3
    centres = torch.tensor([[-4.0, 1.0, 0.0], [2.0, 9.0, 5.0]], dtype=torch.float64)
    x = torch.randn(2000, 3, generator=generator, dtype=torch.float64) + centres[which.long()]
    priors, moments = fit_mixture(x, 2, 1e-5, joint, 200, generator)
    for c in [slice(None)] if joint else [slice(i, i + 1) for i in range(3)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = GaussianMixture(
                2, covariance_type="diag", tol=1e-10, max_iter=500, random_state=0
            )
            model.fit(x[:, c].numpy())
        order, ours = model.means_[:, 0].argsort(), moments.mean[:, c][:, 0].argsort()
        expected = (model.means_, model.covariances_)
        for actual, other in zip(moments, expected, strict=True):
            assert_close(actual[:, c][ours], torch.from_numpy(other[order]), 1e-5)
        weights = priors[:, 0 if joint else c].reshape(2)[ours]
        assert_close(weights, torch.from_numpy(model.weights_[order]), 1e-5)


def test_fit_of_a_channel_without_spread():
    x = torch.zeros(50, 2)
    x[:, 1] = torch.linspace(-1, 1, 50)
    priors, moments = fit_mixture(x, 3, 1e-5, generator=torch.Generator().manual_seed(0))
    assert_close(moments.mean[:, 0], torch.zeros(3))
    assert_close(moments.var[:, 0], torch.full((3,), 1e-5))
    assert_close(priors.sum(0), torch.ones(2), 1e-6)


@pytest.mark.parametrize("apart", [5, 500])
def test_float32_moments_of_components_far_apart_lose_no_digits(apart):
    tables = [t.detach() for t in make_tables(channels=4)]
    modes = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64).unsqueeze(1) * apart
    tables[3:5] = modes.expand(3, 4).clone(), torch.zeros(3, 4, dtype=torch.float64)
    x = make_batch((16, 4, 9)) + apart * torch.tensor([-1.0, 1.0]).repeat(8).view(-1, 1, 1)
    wide = run(mixture.norm_elements_by_formula, x.double(), tables, True)
    narrow = run(mixture.norm_elements_by_formula, x.float(), [t.float() for t in tables], True)
    owned = wide.mass > 1
    assert bool(owned.any())
    assert_close(narrow.moments.var[owned].double(), wide.moments.var[owned], 2e-4)
    assert_close(narrow.y.double(), wide.y, 1e-3)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 2, 2)])
@pytest.mark.parametrize("batch", [True, False])
def test_the_plain_formula_of_nothing_is_nothing(shape, batch):
    tables = make_tables()
    result = run(
        mixture.norm_elements_by_formula, torch.zeros(shape, dtype=torch.float64), tables, batch
    )
    assert result.y.shape == shape
    assert_close(result.moments.mean, tables[5])
    assert not bool(result.mass.any())
