"""Assigners that compute the context from the input: nearest cluster, likeliest Gaussian."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from normswap.contexts.assigner import UNKNOWN, Assigner
from normswap.contexts.features import PIXELS, Extractor
from normswap.errors import ContextError
from normswap.functional.moments import wide_dtype


class ClusterAssigner(Assigner):
    """Labels inputs by their features; one with a feature that is not finite is unknown (-1).

    A context computed from the input alone cannot tell more than the input does: it may be used at
    test time, however well it follows the classes.

    Args:
        extractor: makes the features.
        arrays: what the decision needs.
    """

    from_input = True
    shapes: dict[str, int]

    def __init__(self, extractor: Extractor, arrays: dict[str, Tensor]) -> None:
        for name, dims in self.shapes.items():
            array = arrays.get(name)
            if array is None or array.dim() != dims or not bool(array.isfinite().all()):
                raise ValueError(f"expected {name} of {dims} dimensions, finite")
        super().__init__([f"cluster {k}" for k in range(len(arrays["centers"]))])
        self.extractor = extractor
        self.arrays = {name: array.cpu() for name, array in arrays.items()}

    def __call__(self, batch: Any) -> Tensor:
        """Return the context of each input, (N, ...) or first in a tuple or list, on its device."""
        return self.assign(self.extractor(batch))

    def assign(self, features: Tensor) -> Tensor:
        """Return the context of each row of features (N, D), (N,) int64."""
        if features.shape[1] != self.width:
            raise ContextError(f"expected {self.width} features a sample, got {features.shape[1]}")
        finite = features.isfinite().all(1)
        x = torch.where(finite[:, None], features, 0).to(wide_dtype(features))
        placed = {name: array.to(x) for name, array in self.arrays.items()}
        return torch.where(finite, self.scores(x, placed).argmax(1), UNKNOWN)

    @property
    def width(self) -> int:
        """D."""
        center = self.arrays.get("center")
        return self.arrays["centers"].shape[1] if center is None else len(center)

    @abstractmethod
    def scores(self, x: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Return (N, K) of which the largest decides."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what identifies the features, and the arrays."""
        return {"features": self.extractor.describe()}, self.arrays

    @classmethod
    def restore(
        cls, names: list[str], record: dict[str, Any], arrays: dict[str, Tensor], features: Any
    ) -> "ClusterAssigner":
        """Rebuild; see `Assigner`."""
        saved = record["features"]
        if features is None:
            if saved["identity"] != PIXELS:
                raise ContextError(
                    f"these clusters were made on features of {saved['identity']}; give it: "
                    "contexts.load(folder, features=model)"
                )
            features = PIXELS
        assigner = cls(Extractor(features, saved), arrays)
        if len(names) != assigner.num_contexts:
            raise ValueError(f"{len(names)} names of {assigner.num_contexts} clusters")
        assigner.names = tuple(names)
        return assigner


class KMeansAssigner(ClusterAssigner):
    """Labels inputs by the nearest of K centers, (K, D)."""

    kind = "kmeans"
    shapes = {"centers": 2}  # noqa: RUF012

    def scores(self, x: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Return half the negative squared distances, less what all centers share."""
        # Centred, since the expanded square loses digits to a large common mean.
        origin = arrays["centers"].mean(0)
        centers = arrays["centers"] - origin
        return (x - origin) @ centers.T - 0.5 * centers.square().sum(1)


class GaussianMixtureAssigner(ClusterAssigner):
    """Labels inputs by the component of a Gaussian mixture that they most probably come from.

    Features are centred, projected, ``z = (x - center) @ projection``, and weighed by
    ``log w_k + log det L_k - 1/2 |(z - mu_k) L_k|^2`` with ``L L^T`` the precision.
    """

    kind = "gaussian_mixture"
    shapes = {  # noqa: RUF012
        "center": 1,
        "projection": 2,
        "centers": 2,
        "cholesky": 3,
        "log_weights": 1,
    }

    def scores(self, x: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Return the log of the joint density of input and component, up to a constant."""
        z = (x - arrays["center"]) @ arrays["projection"]
        cholesky = arrays["cholesky"]
        mapped = torch.einsum("nkd,kde->nke", z[:, None] - arrays["centers"], cholesky)
        spread = cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        return arrays["log_weights"] + spread - 0.5 * mapped.square().sum(2)
