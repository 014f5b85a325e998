"""Find the methods by which a model freezes norms that it finds by class."""

import itertools
import types

from normswap.graph.code.bytecode import codes_of, once_per_code
from normswap.graph.code.library import is_torch
from normswap.graph.code.uses import instructions_of
from normswap.util.original_class import FREEZING

_ASKS = {"isinstance", "__class__"}
_EXCHANGES = {"setattr", "delattr", "add_module", "register_module"}


def learn_freezing(cls: type) -> None:
    """Note the methods of a model that switch the mode of norms, which are told what those were.

    One is `freeze_encoder` of segmentation_models_pytorch. Tools, which exchange or mark modules,
    have to see what is there.
    """
    for base in cls.__mro__:
        if not is_torch(base.__module__):
            functions = [v for v in vars(base).values() if isinstance(v, types.FunctionType)]
            codes = [code for f in functions for code in codes_of(f.__code__)]
            FREEZING.update(filter(_freezes, codes))


@once_per_code
def _freezes(code: types.CodeType) -> bool:
    names = set(code.co_names)
    if not names & {"train", "eval"} or names & _EXCHANGES:
        return False
    steps = list(instructions_of(code))
    if not names & _ASKS and all(step.opname != "MATCH_CLASS" for step in steps):
        return False
    own = code.co_varnames[:1]
    for before, step in itertools.pairwise(steps):
        # A flag of its own may say that it is frozen.
        kept = before.argval in own or step.argval in ("requires_grad", "training")
        if step.opname in ("STORE_SUBSCR", "DELETE_ATTR", "STORE_ATTR") and not kept:
            return False
    return True
