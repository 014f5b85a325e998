"""Contexts from the target class: the superclass it belongs to."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normswap.contexts.assigner import UNKNOWN, Assigner
from normswap.contexts.cifar100 import SUPERCLASSES
from normswap.errors import ContextError, UnknownNameError

Class = str | int


class SuperclassAssigner(Assigner):
    """Labels target classes, indices or names, by their superclass.

    Attributes:
        classes: names of the classes, in the order of their indices; None where only names are
            known, or only indices.
    """

    kind = "superclasses"
    caution = (
        "a superclass is read off the target: use it in training, and leave the label unknown at "
        "test time (context=None), where it would be a part of the answer"
    )

    def __init__(
        self, names: Sequence[str], table: Mapping[Class, int], classes: Sequence[str] | None
    ) -> None:
        super().__init__(names)
        self.table = dict(table)
        self.classes = None if classes is None else tuple(classes)

    def __call__(self, batch: Tensor | Class | Iterable[Class | None]) -> Tensor:
        """Return the superclass of each class; -1 for a class that is not known."""
        given: Any = batch
        if hasattr(given, "tolist"):
            kind = str(given.dtype)
            if given.ndim > 1 or not ("int" in kind or "str" in kind or "<U" in kind):
                raise ContextError(
                    f"expected classes as integers (N,), got {kind} of shape {tuple(given.shape)}"
                )
            given = given.tolist()
        if isinstance(given, str | int):
            given = [given]
        if not isinstance(given, Iterable):
            raise ContextError(f"expected classes, names or indices, got {given!r}")
        return torch.tensor([self._label(item) for item in given], dtype=torch.int64, device="cpu")

    def _label(self, item: Any) -> int:
        if item is None:
            return UNKNOWN
        if isinstance(item, str):
            if not any(isinstance(key, str) for key in self.table):
                raise ContextError(f"expected classes as indices, as in the mapping, got {item!r}")
            return self.table.get(item, UNKNOWN)
        try:
            index = operator.index(item)
        except TypeError:
            raise ContextError(f"expected a class, a name or an index, got {item!r}") from None
        if self.classes is not None:
            exists = 0 <= index < len(self.classes)
            return self.table.get(self.classes[index], UNKNOWN) if exists else UNKNOWN
        if not any(isinstance(key, int) for key in self.table):
            raise ContextError(
                f"expected names of classes, as in the mapping, got the index {index}; give "
                "from_superclasses(..., classes=[...]) their order"
            )
        return self.table.get(index, UNKNOWN)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the table and the order of classes."""
        return {"table": list(self.table.items()), "classes": self.classes}, {}

    @classmethod
    def restore(
        cls, names: list[str], record: dict[str, Any], arrays: dict[str, Tensor], features: Any
    ) -> "SuperclassAssigner":
        """Rebuild; see `Assigner`."""
        table = {key: int(value) for key, value in record["table"]}
        if not all(0 <= value < len(names) for value in table.values()):
            raise ValueError(f"contexts of classes are {sorted(set(table.values()))}")
        return cls(names, table, record["classes"])


def from_superclasses(
    mapping: str | Mapping[Any, str],
    classes: Sequence[str] | None = None,
    targets: Tensor | Iterable[Class] | None = None,
) -> SuperclassAssigner:
    """Make a context of each superclass of the target classes.

    The context is then a function of the target. It helps a model learn; fed at test time it gives
    a part of the answer away, so its report and a warning always say that the label must be
    unknown there.

    Args:
        mapping: class -> superclass, classes being names or indices; or "cifar100", its 100 classes
            in alphabetical order and their 20 superclasses (whose order is that of the data set's
            coarse labels).
        classes: names of the classes in the order of their indices, such as ``dataset.classes``;
            needed to label indices where the mapping has names.
        targets: classes of the training set, to count sizes and priors from; without them the
            priors are uniform.

    Raises:
        UnknownNameError: no built-in mapping of this name.
        ContextError: an empty mapping, keys that are neither names nor indices, a class of
            `classes` without a superclass.

    Warns:
        ContextWarning: always; see above. And of tiny contexts, given targets.
    """
    if isinstance(mapping, str):
        if mapping != "cifar100":
            raise UnknownNameError(
                f"no mapping {mapping!r} is built in; there is 'cifar100', or give a dict from "
                "class to superclass"
            )
        mapping = {name: group for group, members in SUPERCLASSES.items() for name in members}
        classes = sorted(mapping) if classes is None else classes
    if not isinstance(mapping, Mapping):
        raise ContextError(f"expected a dict from class to superclass, got {mapping!r}")
    kinds = {type(key) for key in mapping}
    if kinds not in ({str}, {int}) or not all(isinstance(v, str) for v in mapping.values()):
        raise ContextError(
            "expected a mapping from classes, all names or all indices, to names of superclasses, "
            f"got {dict(list(mapping.items())[:3])!r}"
        )
    if classes is not None:
        if kinds == {int}:
            raise ContextError("expected classes= with a mapping from names, got one from indices")
        if missing := [name for name in classes if name not in mapping]:
            raise ContextError(
                f"expected a superclass for every class, found none for {', '.join(missing[:6])}"
            )
    names = sorted(set(mapping.values()))
    table = {key: names.index(group) for key, group in mapping.items()}
    assigner = SuperclassAssigner(names, table, classes)
    if targets is not None:
        labels = targets if isinstance(targets, Tensor) else list(targets)
        assigner.count(assigner(labels), labels)
    assigner.warn()
    return assigner
