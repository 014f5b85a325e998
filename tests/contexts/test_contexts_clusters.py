"""Contexts that are found in the data: k-means, Gaussian mixtures."""

import copy
import warnings
import weakref

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap import ContextError, ContextWarning, contexts

METHODS = [contexts.kmeans, contexts.gaussian_mixture]
both = pytest.mark.parametrize("find", METHODS, ids=["kmeans", "gaussian_mixture"])


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.images / 16).float().unsqueeze(1), torch.tensor(data.target)


def blobs(count=600, seed=0, dtype=torch.float32):
    """Three groups of points in four dimensions, far apart, and which is which."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(3, (count,), generator=generator)
    centers = torch.tensor([[0.0, 0, 0, 0], [4, 0, 4, 0], [0, 4, 0, -4]])
    return (centers[group] + torch.randn(count, 4, generator=generator)).to(dtype), group


def batches(x, size=50):
    return list(x.split(size))


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


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_labels_do_not_depend_on_the_dtype(find, dtype):
    x = blobs()[0].to(dtype)
    assigner = find(batches(x), 3)
    assert torch.equal(assigner(x), assigner(x.float()))
    assert assigner(x).dtype == torch.int64


def test_bytes_and_floats_of_an_image_are_the_same_pixels(digits):
    assigner = contexts.kmeans(batches(digits[0]), 5)
    pixels = (digits[0] * 255).round().to(torch.uint8)
    assert torch.equal(assigner(pixels), assigner(pixels.float() / 255))


def test_large_images_are_averaged_to_32_pixels():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(80, 3, 96, 64, generator=generator)
    x[::2] *= 0.5
    assigner = contexts.kmeans(batches(x), 2)
    assert assigner.arrays["centers"].shape == (2, 3 * 32 * 32)
    small = x.unflatten(2, (32, 3)).unflatten(4, (32, 2)).mean((3, 5))
    assert torch.equal(assigner(x), assigner(small))


def test_a_tiny_cluster_is_warned_of():
    x = torch.cat([blobs()[0], torch.full((5, 4), 90.0)])
    with pytest.warns(ContextWarning, match=r"1 of 2 contexts are tiny.*\(5\)"):
        contexts.kmeans(batches(x), 2)


class Net(nn.Module):
    """A backbone in timm's manner."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, 10)

    def forward_features(self, x):
        return self.conv(x)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def test_a_model_gives_pooled_features_in_eval_and_stays_as_it_was(digits):
    model = Net().train()
    model.conv[1].eval()
    before = copy.deepcopy(model.state_dict())
    assigner = contexts.kmeans(batches(digits[0]), 4, features=model)
    assert [m.training for m in model.modules()] == [True, True, True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        pooled = copy.deepcopy(model).eval().conv(digits[0]).mean((2, 3)).double()
    expected = torch.cdist(pooled, assigner.arrays["centers"].double()).argmin(1)
    assert torch.equal(assigner(digits[0]), expected)


def test_a_model_of_half_precision_is_given_its_own_dtype(digits):
    model = Net().to(torch.bfloat16)
    assigner = contexts.kmeans(batches(digits[0]), 4, features=model)
    assert assigner.arrays["centers"].dtype == torch.float32


def test_a_timm_model_gives_its_features_before_the_head(digits):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    x = digits[0][:64].repeat(1, 1, 4, 4)
    assigner = contexts.kmeans(batches(x), 1, features=model)
    assert assigner.arrays["centers"].shape == (1, 512)


def test_a_model_that_was_trained_meanwhile_is_refused(digits):
    model = Net()
    assigner = contexts.kmeans(batches(digits[0]), 4, features=model)
    with torch.no_grad():
        model.conv[0].weight.add_(1)
    with pytest.raises(ContextError, match="has changed since"):
        assigner(digits[0])


def test_a_function_makes_features(digits):
    assigner = contexts.kmeans(batches(digits[0]), 3, features=lambda x: x.flatten(1)[:, :5])
    assert assigner.arrays["centers"].shape == (3, 5)


def test_features_with_positions_are_refused(digits):
    with pytest.raises(ContextError, match=r"expected features \(N, D\) of a batch, got"):
        contexts.kmeans(batches(digits[0]), 3, features=lambda x: x)


def test_features_of_no_kind_are_refused():
    with pytest.raises(ContextError, match="expected features= as"):
        contexts.kmeans([torch.randn(90, 4)], 3, features="colour")


def test_a_model_converts_with_an_assigner(digits):
    x, y = digits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assigner = contexts.kmeans(DataLoader(TensorDataset(x, y), 200), 3)
    model = normswap.convert(Net(), "cn", contexts=assigner, example_inputs=x[:4])
    report = normswap.summary(model)
    assert report.contexts == assigner.names
    assert report.priors == pytest.approx([size / len(x) for size in assigner.sizes])
    model.train()(x[:50], context=assigner(x[:50])).sum().backward()


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
