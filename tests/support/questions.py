"""Forwards that ask for the class of a norm or a container, in the ways that code has of asking."""

import operator

from torch import nn

from tests.support.behave import Block

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d)
TABLE = {Block: 2.0, nn.Sequential: 3.0}


def is_norm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


class Asking(nn.Module):
    """Does something else where a question gets another answer; `untraceable` keeps it scoped."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.block = Block()
        self.list = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

    def ask(self):
        raise NotImplementedError

    def forward(self, x):
        x = self.list(self.block(self.norm(x)))
        return x if self.ask() else 100 * x


class Untraceable(Asking):
    def forward(self, x):
        try:
            return super().forward(x)
        except KeyError:
            return x


class One:
    def ask(self):
        return isinstance(self.norm, nn.BatchNorm2d) and not isinstance(self.norm, nn.BatchNorm3d)


class Base:
    def ask(self):
        return is_norm(self.norm) and not is_norm(self.block)


class Name:
    def ask(self):
        return self.norm.__class__.__name__ == "BatchNorm2d"


class NameOfAny:
    def ask(self):
        return any("BatchNorm" in str(m.__class__) for m in self.modules())


class OwnName:
    def ask(self):
        return self.norm._get_name() == "BatchNorm2d"


class NameOfType:
    def ask(self):
        return type(self.norm).__name__ == "BatchNorm2d"


class NameKept:
    def ask(self):
        kind = type(self.norm)
        name = kind.__qualname__
        return name == "BatchNorm2d"


class NameInALoop:
    def ask(self):
        for kind in type(self.norm).__mro__:
            if kind.__name__ == "BatchNorm2d":
                return True
        return False


class NameOfOneOfSeveral:
    def ask(self):
        kinds = [type(self.norm)]
        return kinds[0].__name__ == "BatchNorm2d"


def deprecated(function):
    """Do what wrappers do that warn of arguments: a text names the method."""

    def run(*args):
        name = function.__name__
        name = f"{args[0].__class__.__name__}.{name}"
        return function(*args)

    return run


class NameOfAMethod:
    @deprecated
    def ask(self):
        return True


class NameByText:
    def ask(self):
        texts = (str(self.norm), f"{self.norm}", "%s" % self.norm, repr(self.norm))  # noqa: UP031
        return all(text.startswith("BatchNorm2d(") for text in texts)


class ByItsCheck:
    def ask(self):
        return hasattr(self.norm, "_check_input_dim")


class NameByGetattr:
    def ask(self):
        return getattr(type(self.norm), "__name__") == "BatchNorm2d"  # noqa: B009


class ModuleOfAny:
    def ask(self):
        return any(m.__module__ == "torch.nn.modules.batchnorm" for m in self.modules())


class Documented:
    def ask(self):
        return "Batch Norm" in self.norm.__doc__


class ByItsForward:
    def ask(self):
        return self.norm.forward.__func__ is nn.BatchNorm2d.forward


class NameOfItsForward:
    def ask(self):
        return self.norm.forward.__qualname__.startswith("_BatchNorm")


class NamesForPeople:
    def ask(self):
        if self.list is None:
            raise TypeError(f"{type(self.norm).__name__} and " + type(self.block).__name__)
        return self.__class__.__name__ == "NamesForPeople" == type(self).__name__


class Matched:
    def ask(self):
        match self.norm:
            case nn.BatchNorm2d():
                return True
        return False


class Several:
    def ask(self):
        return isinstance(self.norm, (nn.BatchNorm1d, nn.BatchNorm2d))


class Named:
    def ask(self):
        return isinstance(self.norm, KINDS)


class Union:
    def ask(self):
        return isinstance(self.norm, nn.BatchNorm1d | nn.BatchNorm2d)


class Exact:
    def ask(self):
        return type(self.norm) is nn.BatchNorm2d


class ExactBesideBases:
    def ask(self):
        known = dict(zip(Block.__mro__, Block.__bases__, strict=False)).get(Block) is nn.Module
        return type(self.norm) is nn.BatchNorm2d and known


class ExactChild:
    def ask(self):
        return type(self.block) is Block and type(self.list) in (nn.Sequential, nn.ModuleList)


class Class:
    def ask(self):
        return self.block.__class__ == Block


class Table:
    def ask(self):
        return TABLE[type(self.block)] == 2.0


class LocalTable:
    def ask(self):
        table = {nn.BatchNorm2d: True}
        return table.get(type(self.norm))


class OwnTable:
    table = {nn.BatchNorm2d: True}  # noqa: RUF012

    def ask(self):
        return self.table.get(type(self.norm))


class OwnTuple:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)

    def ask(self):
        return type(self.norm) in self.kinds


class Place:
    def ask(self):
        return [nn.BatchNorm2d, type(self.block)].index(type(self.norm)) == 0


class Grouped:
    def ask(self):
        groups = {}
        for module in (self.norm, self.block):
            groups.setdefault(type(module), []).append(module)
        return groups.get(nn.BatchNorm2d)


TABLES = [LocalTable, OwnTable, Place, Grouped]


class Subclass:
    def ask(self):
        return issubclass(type(self.norm), nn.BatchNorm2d)


class OtherTypes:
    def ask(self):
        flags = (self.training, 1.0)
        key = "bias" if type(self.training) is str else type(flags) in (str, tuple)
        return key and type(flags) is tuple and type(self.training) in (bool, int)


class OfHeldClass:
    kind = nn.BatchNorm2d

    def ask(self):
        return type(self.norm) is self.kind


class ByOperator:
    def ask(self):
        return operator.is_(type(self.norm), nn.BatchNorm2d)


def kind_of(module):
    return type(module)


class ByHelper:
    def ask(self):
        return kind_of(self.norm) is nn.BatchNorm2d


def looking_up(table):
    return lambda module: table.get(type(module), False)


class ByHeldFunction:
    def __init__(self):
        super().__init__()
        self.look = looking_up({nn.BatchNorm2d: True})

    def ask(self):
        return self.look(self.norm)


ROUNDABOUT = [OfHeldClass, ByOperator, ByHelper, ByHeldFunction]
