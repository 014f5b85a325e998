"""Save what a conversion and the training after it changed, and load it onto the base."""

from dataclasses import asdict
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from normswap._version import __version__
from normswap.conversion.checks import check_model
from normswap.conversion.settings import Settings, make_contexts
from normswap.conversion.target import Target, carry_out, find_target
from normswap.errors import CheckpointError, UnknownNameError, expect_module
from normswap.graph.not_copied import check_copyable
from normswap.graph.state import RECORD
from normswap.graph.surgery import Surgery
from normswap.lifecycle.record import Record, check_parameters, find_root, method_layers
from normswap.lifecycle.training import exempt_norms
from normswap.methods.base import Contexts, get_method, methods
from normswap.methods.registry import parse_options
from normswap.report import Verification
from normswap.saving import fingerprint
from normswap.saving.fingerprint import checksums, samples, shorten
from normswap.saving.folder import find_folder, read_folder, write_folder
from normswap.util.arguments import check_choice, check_flag
from normswap.util.changed_norms import is_quantised
from normswap.util.copies import copy_model
from normswap.util.whole_file import as_path

_SHARDED = (
    "sharded; load the full state dict (torch.distributed.checkpoint.state_dict."
    "get_model_state_dict with full_state_dict=True) into the same conversion, and save that"
)
_STATES = ("changed", "norms", "all")


def save(model: nn.Module, folder: str | PathLike[str], *, state: str = "changed") -> None:
    """Write what a conversion made of a model, and what was trained since, to a folder.

    ``normswap.json`` says how to convert the base and what the base looks like; a safetensors file
    holds the layers of the method, running statistics included, and by default every other tensor
    that is no longer what it was at conversion: a trained head, fine-tuned convolutions, running
    statistics of norms that were kept. Training the norms alone leaves a small file; after
    fine-tuning everything it is as large as the model. `load` puts it onto the base.

    What changed is told by 1,021 elements of each tensor, evenly spread, and by torch's counters of
    writes. A few numbers of a larger tensor that were changed through ``.data`` or NumPy, or in a
    copy of the model, may be missed; `load` then refuses the base, as it does any other.

    A save is whole or not there: a process killed at any moment leaves the one before readable.
    Of several processes that train together, let one save.

    Args:
        model: a converted model.
        folder: made if it is not there; an earlier save in it is replaced.
        state: "changed", as above; "norms", the layers of the method alone, so that OTHER TRAINED
            WEIGHTS ARE NOT SAVED; or "all", every tensor.

    Raises:
        ConversionError: not a converted model; a layer of which a parameter is pruned or computed.
        NormswapError: safetensors is missing.
        CheckpointError: sharded or quantised parameters, or none with values; an option of the
            method that JSON cannot hold; a folder that cannot be written to.
        UnknownNameError: another `state`.
    """
    check_choice("state", state, _STATES)
    root, record = find_root(model)
    path = as_path(folder, CheckpointError)
    check_parameters(method_layers(root), written=True)
    layers, others = fingerprint.layer_tensors(root), fingerprint.other_tensors(root)
    for name, tensor in (layers | others).items():
        what = "without values" if tensor.is_meta else ""
        what = _SHARDED if hasattr(tensor, "full_tensor") else what
        what = "quantised; save the model before that" if is_quantised(tensor) else what
        if what:
            raise CheckpointError(f"cannot save {name}: it is {what}")
    changed = fingerprint.find_changed(others, record.marks)
    stored = {
        name: tensor
        for name, tensor in others.items()
        if state == "all" or (state == "changed" and name in changed)
    }
    # Of what is trained and not stored, no more is known of the base than its marks.
    marked = [n for n in others if n not in stored and n in changed and n in record.marks]
    # Names that select a layer's place, which that of the input does not.
    sites = [r for r in record.rows if r.target and not r.target.endswith("(input)")]
    content = {
        "normswap": __version__,
        "method": record.method,
        "options": asdict(record.options),
        "placement": record.placement,
        "contexts": list(record.contexts.names),
        "priors": record.contexts.priors.tolist(),
        "unknown": record.contexts.unknown,
        "answering": record.contexts.answering,
        "sites": sorted({row.fqn for row in sites}),
        "base": fingerprint.describe_original(root),
        "values": checksums({n: others[n] for n in others if n not in stored and n not in marked}),
        "samples": {n: record.marks[n].sample for n in marked},
        "layers": fingerprint.describe(layers),
        "eps": {n: float(m.eps) for n, m in _layers_with_eps(root).items()},
        "others": sorted(stored),
    }
    write_folder(path, content, layers | stored)


@torch.inference_mode(False)  # else what is made here could never be trained
def load(
    base: nn.Module,
    folder: str | PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    inplace: bool = False,
    check_values: bool = True,
    trace: bool = True,
) -> nn.Module:
    """Convert a base model as a saved one was, and give it what was saved.

    The result computes what the saved model did. Layers go where the base is; modes, hooks and
    what is frozen are the base's. Nothing in the folder is run as code.

    Args:
        base: the model that was converted, before conversion, with the weights it had then; what
            was saved besides the layers replaces its own.
        folder: that `save` wrote; or "user/name", a repository of the Hugging Face hub with such a
            folder's files, where no folder here has the name, nor is "user" one, and
            huggingface_hub is installed. Its own login opens private ones.
        revision: branch, tag or commit of the repository; given, the hub is asked in any case.
        subfolder: where the conversion lies below the folder or the top of the repository.
        inplace: change `base` itself instead of a copy.
        check_values: whether the base's tensors that were not saved must have the values they had
            when the saved model was converted. False takes them as they are.
        trace: as for `convert`.

    Returns:
        The converted model.

    Raises:
        NormswapError: safetensors is missing, or huggingface_hub for a repository.
        CheckpointError: a repository the hub does not give; files that are missing, cut short,
            changed, or of a newer version; a base of another architecture or dtype, or with other
            values. The message names what differs.
        ConversionError: a base that cannot be converted, or is already.
        UnknownNameError: a method that is not registered here.
        Whatever is raised, `base` is as it was.
    """
    expect_module(base)
    check_flag("inplace", inplace)
    check_flag("check_values", check_values)
    content, tensors = read_folder(find_folder(folder, revision, subfolder))
    if content["method"] not in methods():
        raise UnknownNameError(
            f"{folder} was saved with method {content['method']!r}, which is not registered here; "
            f"the methods are {', '.join(methods())}: import the file that defines it first"
        )
    check_model(base)
    if not inplace:
        check_copyable(base)
    sites = set(content["sites"])
    replaced = list(content["base"]["norms"])
    apart = fingerprint.differences(content["base"], fingerprint.describe_base(base, replaced))
    if apart:
        raise CheckpointError(f"expected the model that {folder} was made from; {shorten(apart)}")
    target, record = _decide(base, content, sites)
    with Surgery(base if inplace else copy_model(base), trace) as surgery:
        model = carry_out(target, surgery, record)
        others = fingerprint.other_tensors(model)
        _check_values(others, content, folder, check_values)
        record.marks = fingerprint.mark(others)
        wanted = fingerprint.layer_tensors(model)
        # Of any dtype: a cast since conversion has cast what a conversion keeps wider, as priors.
        made, saved = fingerprint.describe(wanted), content["layers"]
        if {n: t[1] for n, t in made.items()} != {n: t[1] for n, t in saved.items()}:
            raise CheckpointError(
                f"converting this model makes other layers than {folder} holds; it was saved by "
                f"normswap {content['normswap']}, this is {__version__}"
            )
        _copy(tensors, wanted | {name: others[name] for name in content["others"]})
        _set_eps(model, content, folder)
    vars(model)[RECORD] = record
    exempt_norms(model)
    return model


def _decide(base: nn.Module, content: dict[str, Any], sites: set[str]) -> tuple[Target, Record]:
    """Return what the description says is to be changed, and the record of it."""
    method = get_method(content["method"])
    options = parse_options(method, content["options"])
    contexts = make_contexts(method, None, None, None)
    if method.needs_context:
        contexts = Contexts(
            tuple(content["contexts"]),
            torch.tensor(content["priors"], dtype=torch.float64, device="cpu"),
            content["unknown"],
            content["answering"],
        )
    placement = content["placement"]
    asked = Settings(method, options, contexts, placement, lambda name, _: name in sites, None)
    target = find_target(base, asked)
    record = Record(method.name, options, contexts, target.rows, type(base).__name__)
    record.placement = placement
    record.verification = Verification(reason="loaded")
    return target, record


def _check_values(
    others: dict[str, Tensor], content: dict[str, Any], folder: Any, wanted: bool
) -> None:
    if any(t.is_meta for t in others.values()):
        raise CheckpointError("expected a base with values, got one on the meta device")
    values, sampled = content["values"], content["samples"]
    strange = [n for n in (*values, *sampled, *content["others"]) if n not in others]
    if strange:
        raise CheckpointError(f"{folder} names tensors that its base has not: {shorten(strange)}")
    if not wanted:
        return
    found = samples({n: others[n] for n in sampled}) | checksums({n: others[n] for n in values})
    unlike = [name for name, value in (sampled | values).items() if found[name] != value]
    if unlike:
        raise CheckpointError(
            f"expected the base with the weights it had at conversion, since {folder} holds only "
            f"what changed; {len(unlike)} tensors have other values: {shorten(unlike)}; give the "
            "same pretrained weights or seed, save with state='all', or pass check_values=False to "
            "take them as they are"
        )


def _layers_with_eps(root: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in method_layers(root).items() if "eps" in vars(layer)}


def _set_eps(model: nn.Module, content: dict[str, Any], folder: Any) -> None:
    """Give layers the eps they had, which no tensor tells: the base's may differ."""
    layers, given = _layers_with_eps(model), content.get("eps", {})
    if strange := [name for name in given if name not in layers]:
        raise CheckpointError(f"{folder} names layers that its base has not: {shorten(strange)}")
    for name, eps in given.items():
        layers[name].eps = eps


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    if source.keys() != target.keys():
        apart = sorted(source.keys() ^ target.keys())
        raise CheckpointError(f"expected tensors for the names in the description, not {apart[:6]}")
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            raise CheckpointError(f"{name} is {tuple(source[name].shape)} in the file")
    for name, tensor in target.items():
        tensor.copy_(source[name])
