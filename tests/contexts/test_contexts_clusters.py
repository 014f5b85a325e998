"""Contexts that are found in the data: k-means, Gaussian mixtures."""

import weakref

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch.utils.data import DataLoader, TensorDataset

from normswap import ContextError, ContextWarning, contexts
from tests.support.clusters import batches, blobs, both


@both
def test_groups_far_apart_are_found(find):
    x, group = blobs()
    assert adjusted_rand_score(group, find(batches(x), 3)(x)) > 0.97


@both
def test_unseen_data_gets_the_same_groups(find):
    assigner = find(batches(blobs()[0]), 3)
    x, group = blobs(seed=1)
    assert adjusted_rand_score(group, assigner(x)) > 0.97


@both
def test_a_larger_set_is_streamed_and_counted_whole(find):
    x, group = blobs(4000)
    assigner = find(batches(x), 3, samples=200)
    assert sorted(assigner.sizes) == sorted(torch.bincount(assigner(x)).tolist())
    assert sum(assigner.sizes) == 4000
    assert adjusted_rand_score(group, assigner(x)) > 0.97


def test_k_means_on_digits_is_as_tight_as_scikit_learns(digits):
    x = digits[0].flatten(1)
    reference = KMeans(10, n_init=4, random_state=1).fit(x.numpy()).inertia_
    for samples in (2000, 400):
        centers = contexts.kmeans(batches(digits[0]), 10, samples=samples).arrays["centers"]
        inertia = float(torch.cdist(x, centers).min(1).values.square().sum())
        assert inertia < 1.03 * reference


def test_the_nearest_center_decides(digits):
    assigner = contexts.kmeans(batches(digits[0]), 7)
    x = digits[0].flatten(1).double()
    expected = torch.cdist(x, assigner.arrays["centers"].double()).argmin(1)
    assert torch.equal(assigner(digits[0]), expected)


def test_a_mixture_decides_as_scikit_learns_would():
    x, _ = blobs()
    assigner = contexts.gaussian_mixture(batches(x), 3)
    arrays = {name: array.numpy() for name, array in assigner.arrays.items()}
    reference = GaussianMixture(3)
    reference.means_, reference.precisions_cholesky_ = arrays["centers"], arrays["cholesky"]
    reference.weights_ = torch.from_numpy(arrays["log_weights"]).exp().numpy()
    z = (x.double().numpy() - arrays["center"]) @ arrays["projection"]
    assert assigner(x).tolist() == reference.predict(z).tolist()


@both
def test_the_seed_decides_whatever_the_random_state(find, digits):
    loader = DataLoader(TensorDataset(*digits), 100, shuffle=True)
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        results.append(find(loader, 5, seed=3, samples=500)(digits[0]))
    assert torch.equal(*results)
    assert not torch.equal(results[0], find(loader, 5, seed=4, samples=500)(digits[0]))


@both
def test_random_state_is_put_back(find):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    find(batches(blobs()[0]), 3)
    assert torch.equal(torch.rand(3), expected)


@both
def test_classes_that_come_along_are_compared_but_are_no_leak(find, digits):
    """The context comes from the image alone, so it cannot tell more than the image."""
    assigner = find(DataLoader(TensorDataset(*digits), 100), 10)
    assert assigner.report().leak > 0.6
    assert assigner.report().warnings == ()


@both
def test_inputs_that_are_not_finite_are_unknown(find):
    x, _ = blobs()
    assigner = find(batches(x), 3)
    bad = x[:4].clone()
    bad[1, 2], bad[3, 0] = float("nan"), float("inf")
    assert (assigner(bad) == -1).tolist() == [False, True, False, True]


@both
def test_fitting_on_values_that_are_not_finite_is_refused_with_the_batch(find):
    x = blobs()[0]
    x[120, 1] = float("nan")
    with pytest.raises(ContextError, match="got 1 of 50 samples with others in batch 2"):
        find(batches(x), 3)


@both
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "at least 3 samples, one a context, got 0"),
        ([torch.randn(2, 4)], "at least 3 samples, one a context, got 2"),
        ([torch.ones(90, 4)], "found 1: the others are alike"),
        ([torch.eye(4)[:2].repeat(40, 1)], "found 2: the others are alike"),
        (torch.randn(90, 4), "expected a loader that yields batches, got Tensor"),
        ([{"x": torch.randn(90, 4)}], "expected a batch that is a real tensor"),
        ([torch.randn(90)], r"expected a batch \(N, C, H, W\)"),
        ([torch.randn(90, 4) * 1e30], r"below 1e\+15, got 90 of 90"),
        ([torch.randn(90, 4, dtype=torch.complex64)], "a real tensor"),
        ([torch.randn(90, 0)], r"expected features \(N, D\)"),
        ([torch.randn(40, 4), torch.randn(40, 5)], r"size \[4\], as at first, got \[5\]"),
    ],
)
def test_sets_that_cannot_be_clustered_are_refused(find, loader, message):
    with pytest.raises(ContextError, match=message):
        find(loader, 3)


@both
@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_a_count_below_one_is_refused(find, count):
    with pytest.raises(ContextError, match="num_contexts"):
        find([torch.randn(90, 4)], count)


@both
@pytest.mark.parametrize("seed", [-1, "a", 2**32])
def test_a_seed_out_of_range_is_refused(find, seed):
    with pytest.raises(ContextError, match="expected seed="):
        find([torch.randn(90, 4)], 2, seed=seed)


@both
def test_one_context_takes_everything(find):
    x = blobs()[0]
    assert find(batches(x), 1)(x).unique().tolist() == [0]


@both
def test_an_iterator_will_do_if_the_set_fits_and_else_is_refused(find):
    x = blobs()[0]
    assert sum(find(iter(batches(x)), 3).sizes) == 600
    with pytest.raises(ContextError, match="can be read again"):
        find(iter(batches(x)), 3, samples=300)


def test_a_loader_that_gives_less_the_second_time_is_refused():
    class Fading:
        times = 0

        def __iter__(self):
            self.times += 1
            return iter(batches(blobs()[0])[self.times :])

    with pytest.raises(ContextError, match="each time it is read"):
        contexts.kmeans(Fading(), 3, samples=100)


@both
def test_an_empty_batch_has_no_labels(find):
    assigner = find([*batches(blobs()[0]), torch.empty(0, 4)], 3)
    assert assigner(torch.empty(0, 4)).shape == (0,)


def test_a_tiny_cluster_is_warned_of():
    x = torch.cat([blobs()[0], torch.full((5, 4), 90.0)])
    with pytest.warns(ContextWarning, match=r"1 of 2 contexts are tiny.*\(5\)"):
        contexts.kmeans(batches(x), 2)


@both
def test_batches_are_let_go_while_the_set_streams(find):
    alive, most = weakref.WeakSet(), []

    class Large:
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            for _ in range(60):
                batch = torch.randn(256, 8, generator=generator)
                alive.add(batch)
                most.append(len(alive))
                yield batch
                del batch

    assigner = find(Large(), 4, samples=500)
    assert sum(assigner.sizes) == 60 * 256
    # Those of one block of mini-batch k-means, and the one being read.
    assert max(most) <= 6


@pytest.mark.gpu
def test_labels_stay_on_the_device(digits):
    assigner = contexts.kmeans(batches(digits[0].cuda()), 4)
    labels = assigner(digits[0].cuda())
    assert labels.is_cuda
    assert torch.equal(labels.cpu(), assigner(digits[0]))
