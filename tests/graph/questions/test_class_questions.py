"""Questions of class in a forward get the answer they had before conversion, or are refused."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import ConversionError
from tests.support.behave import Block, Holder, call, check, close, images, randomize
from tests.support.questions import (
    ROUNDABOUT,
    TABLES,
    Asking,
    Base,
    ByItsCheck,
    ByItsForward,
    Class,
    Documented,
    Exact,
    ExactBesideBases,
    ExactChild,
    Matched,
    ModuleOfAny,
    Name,
    NameByGetattr,
    NameByText,
    Named,
    NameInALoop,
    NameKept,
    NameOfAMethod,
    NameOfAny,
    NameOfItsForward,
    NameOfOneOfSeveral,
    NameOfType,
    NamesForPeople,
    One,
    OtherTypes,
    OwnName,
    OwnTuple,
    Several,
    Subclass,
    Table,
    Union,
    Untraceable,
)
from tests.support.sampling import crossed

METHODS = ["cn", "cn-x", "acn"]


def make(kind, base):
    return type(kind.__name__, (kind, base), {})()


NAMES = [Name, NameOfAny]
SEVERAL = [Several, Named, Union, *NAMES]  # not answered in compiled code
if torch.__version__ >= "2.15.0a0":
    SEVERAL += [One, Base, Matched]
ANSWERED = [One, Base, *NAMES, OwnName, NamesForPeople, Matched, OtherTypes, NameByText, ByItsCheck]
KEPT = [NameKept, NameInALoop, NameOfOneOfSeveral, NameByGetattr]
KEPT += [ModuleOfAny, Documented, ByItsForward, NameOfItsForward]
UNANSWERED = [Exact, OwnTuple, NameOfType, Subclass, *KEPT, *TABLES, *ROUNDABOUT]
OF_CONTAINERS = [ExactChild, Class, Table]  # which keep their class


@pytest.mark.parametrize(
    "kind",
    [*ANSWERED, Several, Union, ExactChild, Class],
)
def test_a_trace_gives_the_answer_of_the_original_or_ends(kind):
    asks_kind = kind in (One, Base, OwnName, Several, Union, Matched, NameByText, ByItsCheck)
    check(make(kind, Asking), opaque=None if asks_kind else "")


# Nothing keeps forwards of `acn` out of compiled code: what that does not answer is refused below.
LAYERS = [(k, m) for k in ANSWERED for m in METHODS if m != "acn" or k not in SEVERAL]


@pytest.mark.parametrize(("kind", "method"), LAYERS)
@pytest.mark.parametrize("base", [Asking, Untraceable])
def test_the_layers_answer_as_the_norms_did(kind, base, method):
    model = make(kind, base).eval()
    randomize(model)
    converted = normswap.convert(model, method, verify=False)
    close(call(converted, (images(),)), call(model, (images(),)))


@pytest.mark.parametrize(
    ("kind", "base", "method"),
    [
        *itertools.product(UNANSWERED, [Untraceable], ["cn", "cn-x"]),
        *itertools.product(UNANSWERED, [Asking], ["cn"]),
        *itertools.product([*SEVERAL, Exact, Subclass], [Untraceable], ["acn"]),
        *itertools.product(OF_CONTAINERS, [Untraceable], ["crossnorm"]),
    ],
)
def test_what_no_layer_can_answer_is_refused(kind, base, method):
    model = make(kind, base)
    before = copy.deepcopy(model)
    options = {"placement": "pre"} if method == "crossnorm" else {}
    with pytest.raises(normswap.ConversionError, match=r"ask.*exclude="):
        normswap.convert(model, method, inplace=True, verify=False, **options)
    close(call(model.eval(), (images(),)), call(before.eval(), (images(),)))
    assert type(model.norm) is nn.BatchNorm2d
    assert type(model.block) is Block


@pytest.mark.parametrize("kind", OF_CONTAINERS)
def test_a_container_whose_class_is_asked_for_keeps_it(kind):
    model = make(kind, Untraceable).eval()
    randomize(model)
    converted = normswap.convert(model, "cn", contexts=["a", "b"], verify=False)
    assert type(converted.block) is Block
    assert normswap.summary(converted).count(delivery="unreached") == 0
    for copied in (converted, copy.deepcopy(converted)):
        close(call(copied, (images(),)), call(model, (images(),)))
    for layer in (m for m in converted.modules() if isinstance(m, normswap.ContextNorm)):
        layer.running_mean[1] += 0.5
    x = images()
    mixed = converted(x, context=[i % 2 for i in range(len(x))])
    one = [converted(x[i : i + 1], context=i % 2) for i in range(len(x))]
    torch.testing.assert_close(mixed, torch.cat(one))
    assert not torch.allclose(converted(x, context="a"), converted(x, context="b"))
    plain = normswap.specialize(converted, "a")
    assert type(plain.block) is Block
    torch.testing.assert_close(plain(x), converted(x, context="a"))


@pytest.mark.parametrize("kind", [Exact, ExactBesideBases, OwnTuple, Subclass, *TABLES])
def test_the_exclude_that_the_error_names_serves(kind):
    model = make(kind, Untraceable).eval()
    model.list[0] = nn.InstanceNorm2d(4)  # one that is left where no batch norm is
    model.list.append(nn.Sequential(nn.BatchNorm2d(4)))
    model.last = nn.InstanceNorm2d(4)
    with pytest.raises(normswap.ConversionError) as raised:
        normswap.convert(model, "cn", verify=False)
    exclude = eval(str(raised.value).split("exclude=")[1], vars(nn))
    converted = normswap.convert(model, "cn", exclude=exclude, verify=False)
    close(call(converted, (images(),)), call(model, (images(),)))


COMPILED = [k for k in (One, Base, NamesForPeople) if k not in SEVERAL]


@pytest.mark.parametrize(("kind", "method"), crossed(COMPILED, METHODS))
def test_compiled_forwards_get_the_same_answer(kind, method):
    torch._dynamo.reset()
    model = make(kind, Untraceable).eval()
    randomize(model)
    converted = normswap.convert(model, method, verify=False)
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    close(call(compiled, (images(),)), call(model, (images(),)))


@pytest.mark.parametrize(("kind", "method"), crossed(SEVERAL, ["cn", "cn-x"]))
def test_several_classes_are_asked_for_outside_of_compiled_code(kind, method):
    torch._dynamo.reset()
    model = make(kind, Untraceable).eval()
    randomize(model)
    converted = normswap.convert(model, method, verify=False)
    close(call(converted, (images(),)), call(model, (images(),)))
    compiled = torch.compile(converted, backend="eager")
    close(call(compiled, (images(),)), call(model, (images(),)))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"one where .*exclude="):
        torch.compile(converted, backend="eager", fullgraph=True)(images())


@pytest.mark.parametrize("method", [m for m in METHODS if (One, m) in LAYERS])
def test_a_forward_called_by_itself_asks_too(method):
    model = make(One, Untraceable).eval()
    converted = normswap.convert(model, method, verify=False)
    close([converted.forward(images())], [model.forward(images())])


def test_a_text_that_names_a_method_asks_for_no_class():
    model = make(NameOfAMethod, Untraceable).eval()
    converted = normswap.convert(model, "cn", verify=False)
    close(call(converted, (images(),)), call(model, (images(),)))


@torch.compiler.disable
def is_norm_when_run(module):
    return isinstance(module, nn.BatchNorm2d)


@torch.compiler.disable
def name_when_run(_, module):
    return type(module).__name__


class AskedOutside(Untraceable):
    def ask(self):
        return is_norm_when_run(self.norm) and not is_norm_when_run(self.block)


class NamedOutside(Untraceable):
    def ask(self):
        return name_when_run(self, self.norm) == "BatchNorm2d"


def test_what_torch_wraps_asks_no_more_than_what_it_wraps():
    # The wrapper of `torch.compiler.disable`, which bears the name of the user's module, goes by
    # names of classes in what it prints.
    model = AskedOutside()
    converted = normswap.convert(model, "cn", verify=False)
    close(call(converted.eval(), (images(),)), call(model.eval(), (images(),)))
    with pytest.raises(ConversionError, match="name_when_run goes by the name of a class"):
        normswap.convert(NamedOutside(), "cn", verify=False)


def test_norms_that_are_excluded_may_be_asked_for():
    model = make(Exact, Untraceable)
    model.list[0] = nn.InstanceNorm2d(4)
    converted = normswap.convert(model, "cn", exclude=nn.BatchNorm2d, verify=False)
    close(call(converted.eval(), (images(),)), call(model.eval(), (images(),)))


@pytest.mark.parametrize("method", METHODS)
def test_tools_outside_a_forward_see_what_is_there(method):
    converted = normswap.convert(Holder(), method, verify=False)
    layer = converted.a.norm
    assert not isinstance(layer, nn.BatchNorm2d)
    assert layer.__class__ is type(layer)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(converted))
    assert type(synced.a.norm) is type(layer)
    assert type(pickle.loads(pickle.dumps(converted)).a.norm) is type(layer)
    assert type(layer).__name__ in repr(converted)


def test_a_tool_may_exchange_the_class_of_a_layer():
    layer = normswap.convert(Holder(), "cn", verify=False).a.norm
    made = type("Sharded", (type(layer),), {})
    layer.__class__ = made
    assert type(layer) is layer.__class__ is made
    assert layer(images()).shape == images().shape


def doubles_norms(module, args, output):
    return 2 * output if type(module) is nn.BatchNorm2d else output


def doubles_blocks(module, args, output):
    return 2 * output if type(module) is Block else output


def test_a_hook_that_asks_for_the_class_of_a_norm_is_refused():
    model = make(One, Asking)
    model.norm.register_forward_hook(doubles_norms)
    with pytest.raises(ConversionError, match=r"at norm, .* doubles_norms compares .*exclude="):
        normswap.convert(model, "cn", verify=False)


def test_a_container_whose_hook_asks_for_its_class_keeps_it():
    model = make(One, Asking).eval()
    randomize(model)
    model.block.register_forward_hook(doubles_blocks)
    converted = normswap.convert(model, "cn", contexts=2, verify=False)
    close(call(converted, (images(),)), call(model, (images(),)))


def test_a_hook_that_only_looks_is_in_nobodys_way():
    kinds = []

    def look(module, args, output):
        kinds.append(type(module) is nn.BatchNorm2d)

    model = make(One, Asking)
    model.norm.register_forward_hook(look)
    normswap.convert(model, "cn", verify=False)
