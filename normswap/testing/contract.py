"""Run the contract: every check that a method's flags say applies to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from warnings import catch_warnings, simplefilter

import torch

from normswap.errors import AdviceWarning, ContractError, ConversionError
from normswap.methods.base import BaseMethod
from normswap.methods.registry import _REGISTRY, get_method, parse_options, register_method
from normswap.testing import function, lifecycle, tools, train_steps
from normswap.testing.case import CHECKS, Case
from normswap.util.arguments import describe

_PARTS = (function, train_steps, tools, lifecycle)  # importing them fills CHECKS


@dataclass(frozen=True)
class Check:
    """One requirement of one method; call it to check it.

    Attributes:
        method: which.
        options: of the method, by name.
        function: does it; its docstring says what is required.
    """

    method: BaseMethod
    options: tuple[tuple[str, Any], ...]
    function: Callable[[Case], None]

    @property
    def name(self) -> str:
        """What the requirement is called."""
        return self.function.__name__.removeprefix("check_")

    def __str__(self) -> str:
        """Return a name for a parameter of pytest, ``ids=str``."""
        given = "".join(f"-{value}" for _, value in self.options)
        return f"{self.method.name}{given}-{self.name}"

    def __call__(self) -> None:
        """Check it.

        Raises:
            ContractError: the method does not meet it; the message says which, where and by how
                much.
        """
        with _registered(self.method), torch.random.fork_rng(devices=[]), catch_warnings():
            # Its models were trained by chance: what a conversion advises on them is void.
            simplefilter("ignore", AdviceWarning)
            torch.manual_seed(0)
            try:
                self.function(Case(self.method, self.options))
            except Exception as error:
                kind = "" if isinstance(error, ContractError) else f"{type(error).__name__}: "
                required = " ".join(str(self.function.__doc__).split())
                raise ContractError(
                    f"method {self.method.name!r} fails {self.name}. Required: {required} Found: "
                    f"{kind}{error}"
                ) from error


@contextmanager
def _registered(method: BaseMethod) -> Iterator[None]:
    """Register a method that is not, for as long."""
    if _REGISTRY.get(method.name) is method:
        yield
        return
    register_method(type(method))
    _REGISTRY[method.name] = method
    try:
        yield
    finally:
        del _REGISTRY[method.name]


def method_checks(
    method: str | type[BaseMethod], *, processes: bool = False, **options: Any
) -> list[Callable[[], None]]:
    """Return the checks that apply to a method, to be called one by one.

    ``@pytest.mark.parametrize("check", method_checks("mine"), ids=str)`` makes a test of each.

    Args:
        method: its name, or its class, which need not be registered.
        processes: whether to check synchronised training too, which starts two processes.
        **options: of the method; its own defaults for the others.

    Raises:
        UnknownNameError: no method of that name.
        ConversionError: neither a name nor the class of a method, or a name that another has.
    """
    if isinstance(method, str):
        chosen = get_method(method)
    elif isinstance(method, type) and issubclass(method, BaseMethod):
        known = _REGISTRY.get(method.name)
        chosen = known if type(known) is method else method()
    else:
        raise ConversionError(f"expected a method by name or class, got {describe(method)}")
    parse_options(chosen, options)
    with _registered(chosen):
        chosen_checks: list[Any] = [
            Check(chosen, tuple(options.items()), run)
            for run, applies in CHECKS.items()
            if applies(chosen) and (processes or run is not tools.check_synchronised)
        ]
    return chosen_checks


def check_method(
    method: str | type[BaseMethod], *, processes: bool = False, **options: Any
) -> None:
    """Check that a method does what the package relies on; scikit-learn's ``check_estimator``.

    The flags of the method say what is asked of it: see `normswap.methods.base.BaseMethod`. Its
    layers have to be of classes that pickle. Takes about a minute.

    Args:
        method: its name, or its class, which need not be registered.
        processes: whether to check synchronised training too, which starts two processes.
        **options: of the method; its own defaults for the others.

    Raises:
        ContractError: the first requirement that is not met, with numbers.
        UnknownNameError, ConversionError: as `method_checks`.
    """
    for check in method_checks(method, processes=processes, **options):
        check()
