"""Find clusters in a stream of batches: k-means, Gaussian mixtures."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from normswap.contexts.cluster_assigners import (
    ClusterAssigner,
    GaussianMixtureAssigner,
    KMeansAssigner,
)
from normswap.contexts.features import PIXELS, Features
from normswap.contexts.loader_features import LoaderFeatures
from normswap.errors import ContextError, ContextWarning
from normswap.util.extras import need

BLOCK = 1024
LEAST_SPREAD = 1e-3


def kmeans(
    loader: Iterable[Any],
    num_contexts: int,
    features: Features = PIXELS,
    *,
    seed: int = 0,
    samples: int = 10_000,
    progress: bool = True,
) -> ClusterAssigner:
    """Make a context of each cluster that k-means finds in a data set.

    A uniform sample of the features is kept (a reservoir) and k-means, started by k-means++, run
    on it. If the set is larger, its centres are where mini-batch k-means starts, which streams over
    the whole set; a last pass counts. A set no larger than the sample is read once.

    Args:
        loader: yields batches: inputs (N, ...), or a tuple or list that begins with them; if
            integer classes (N,) come second, the report says how well clusters follow them. A
            list or DataLoader, which can be read again; an iterator only if the set fits in the
            sample. Its random order is drawn from `seed`.
        num_contexts: K.
        features: "pixels", those of images up to 32 px, larger ones averaged down to 32 x 32, uint8
            being scaled to [0, 1]; a model, of which the pooled features before the head are taken
            where it has timm's `forward_features`, else its output, in eval mode; or a function of
            the inputs. Features are (N, D).
        seed: of the sample, the start and the loader. torch's generators are put back.
        samples: how many to keep. Memory: 4 bytes times samples times D, about twice that during
            the fit, whatever the size of the set.
        progress: show a bar on a terminal, if tqdm is installed.

    Returns:
        An assigner of inputs. It keeps a reference to the model, whose weights must stay.

    Raises:
        ContextError: an empty loader, values that are not finite, fewer different samples than
            clusters, a loader that cannot be read again, a batch or features of another form.
        NormswapError: scikit-learn is missing.

    Warns:
        ContextWarning: of tiny clusters.
    """
    cluster = need("sklearn.cluster", "contexts", "k-means")
    source = LoaderFeatures(loader, features, num_contexts, samples, seed, progress)
    kept = source.sample().numpy()
    fitted = cluster.KMeans(num_contexts, n_init=4, random_state=seed)
    found = _quietly(fitted.fit_predict, kept)
    _check_distinct(len(set(found.tolist())), num_contexts)
    if not source.kept.complete:
        start = {"init": fitted.cluster_centers_, "n_init": 1, "reassignment_ratio": 0}
        fitted = cluster.MiniBatchKMeans(num_contexts, random_state=seed, **start)
        waiting = torch.empty(0, kept.shape[1], device="cpu")

        def learn(x: Tensor, _: Any) -> None:
            nonlocal waiting
            waiting = torch.cat([waiting, x])
            if len(waiting) >= max(num_contexts, BLOCK):
                fitted.partial_fit(waiting.numpy())
                waiting = waiting[:0]

        source.read("k-means", learn)
        if len(waiting):
            fitted.partial_fit(waiting.numpy())
    arrays = {"centers": torch.from_numpy(fitted.cluster_centers_).float()}
    assigner = source.count(KMeansAssigner(source.extractor, arrays))
    assigner.warn()
    return assigner


def gaussian_mixture(
    loader: Iterable[Any],
    num_contexts: int,
    features: Features = PIXELS,
    *,
    dimensions: int = 16,
    seed: int = 0,
    samples: int = 10_000,
    progress: bool = True,
) -> ClusterAssigner:
    """Make a context of each Gaussian of a mixture fitted to a data set.

    A uniform sample of the features is kept (a reservoir), projected on its first principal
    components, and a mixture with full covariances fitted to it by expectation maximisation, the
    best of three starts. The error of such a fit depends on the sample, not on the size of the set
    it was drawn from, so a second pass over a larger set only counts.

    Args:
        loader: as for `kmeans`.
        num_contexts: K.
        features: as for `kmeans`.
        dimensions: principal components to keep. A full covariance has dimensions^2 / 2 values: it
            needs several times as many samples a component.
        seed: as for `kmeans`.
        samples: as for `kmeans`.
        progress: as for `kmeans`.

    Returns:
        An assigner of inputs. It keeps a reference to the model, whose weights must stay.

    Raises:
        ContextError: as for `kmeans`.
        NormswapError: scikit-learn is missing.

    Warns:
        ContextWarning: of tiny components, and where the fit did not converge.
    """
    if dimensions < 1:
        raise ContextError(f"expected dimensions= of at least 1, got {dimensions}")
    decomposition = need("sklearn.decomposition", "contexts", "a Gaussian mixture")
    mixture = need("sklearn.mixture", "contexts", "a Gaussian mixture")
    source = LoaderFeatures(loader, features, num_contexts, samples, seed, progress)
    kept = source.sample()
    if len(kept) < 2:
        raise ContextError("expected two samples or more to fit a mixture to, got one")
    size = min(dimensions, kept.shape[1], len(kept) - 1)
    pca = _quietly(decomposition.PCA(size, random_state=seed).fit, kept.numpy())
    # One scale for all, so that what is added to the variances is a share of them.
    spread = float(pca.explained_variance_.mean()) ** 0.5
    _check_distinct(1 if spread == 0 else num_contexts, num_contexts)
    spread = spread or 1.0
    center = torch.from_numpy(pca.mean_).double()
    projection = torch.from_numpy(pca.components_).double().T / spread
    z = ((kept.double() - center) @ projection).numpy()
    model = mixture.GaussianMixture(
        num_contexts, n_init=3, reg_covar=LEAST_SPREAD, max_iter=300, random_state=seed
    )
    found = _quietly(model.fit_predict, z)
    _check_distinct(len(set(found.tolist())), num_contexts)
    arrays = {
        "center": center,
        "projection": projection,
        "centers": torch.from_numpy(model.means_),
        "cholesky": torch.from_numpy(model.precisions_cholesky_),
        "log_weights": torch.from_numpy(model.weights_).log(),
    }
    assigner = source.count(GaussianMixtureAssigner(source.extractor, arrays))
    if not model.converged_:
        text = f"the mixture of {num_contexts} did not converge in {model.n_iter_} steps"
        warnings.warn(text, ContextWarning, stacklevel=2)
    assigner.warn()
    return assigner


def _quietly(fit: Callable[[Any], Any], data: Any) -> Any:
    """Fit without scikit-learn's warnings: what they warn of is checked afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(data)


def _check_distinct(found: int, wanted: int) -> None:
    if found < wanted:
        raise ContextError(
            f"expected samples that fall into {wanted} clusters, found {found}: the others are "
            "alike; ask for fewer contexts"
        )
