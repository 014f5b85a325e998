"""Which arguments every public function takes, and what none does."""

import torch
from torch import nn

import normswap


class Net(nn.Module):
    """A small convolutional network."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1])
PLANNED = {
    "model": (Net, ""),
    "method": ("cn", ""),
    "contexts": (2, "None, 3, ['cn'], scalar, numpy"),
    "select": (None, "None"),
    "exclude": (None, "None, [], class"),
    "placement": (None, "None"),
    "preset": (None, "None"),
    "unknown": ("pooled", "None"),
    "priors": (None, "None"),
}
# Function, arguments that work, and which junk each argument takes.
FUNCTIONS = {
    "convert": (
        normswap.convert,
        {
            **PLANNED,
            "inplace": (False, "True"),
            "example_inputs": (IMAGES, "None"),
            "verify": (True, "True"),
        },
    ),
    "selfnorm": (
        lambda **given: normswap.convert(Net(), "selfnorm", **given),
        {"placement": ("norm", "None"), "gates": (1, ""), "init": ("identity", "")},
    ),
    "cnsn": (
        lambda **given: normswap.convert(Net(), "cnsn", **given),
        {
            "placement": ("norm", "None"),
            "crop": ("neither", ""),
            "instances": (2, ""),
            "beta": (1.0, "3, 1e9, 10**400, 2.5"),
            "p": (0.5, "0"),
            "active": (1, ""),
            "gates": (1, ""),
            "init": ("identity", ""),
            "crossnorm_at": ("", "''"),
        },
    ),
    "acn": (
        lambda **given: normswap.convert(Net(), "acn", **given),
        {
            "components": (2, "3"),
            "statistics": ("batch", ""),
            "assignment": ("channel", ""),
            "start": ("skewed", ""),
            "strength": (None, "None, 3, 2.5"),
            "contexts": (None, "None"),
            "priors": (None, "None"),
            "unknown": (None, "None"),
        },
    ),
    "cn": (
        lambda **given: normswap.convert(Net(), "cn", **given),
        {"shrink": (1.0, "0, 3, 1e9, 2.5, inf"), "affine": ("shared", "")},
    ),
    "cn-x": (
        lambda **given: normswap.convert(Net(), "cn-x", **given),
        {"statistics": ("batch", "")},
    ),
    "plan": (
        normswap.plan,
        PLANNED,
    ),
    "summary": (normswap.summary, {"model": ("converted", "")}),
    "verify": (
        lambda **given: normswap.verify(normswap.convert(BASE, "cn", contexts=2), **given),
        {"original": ("base", ""), "example_inputs": (IMAGES, "")},
    ),
    "adapt": (
        normswap.adapt,
        {
            "model": ("converted", ""),
            "loader": ([IMAGES], ""),
            "context": (0, "0"),
            "forward": (None, "None"),
            "batches": (None, "None, 3, 1e9"),
            "progress": (False, "True"),
        },
    ),
    "calibrate": (
        normswap.calibrate,
        {
            "model": ("adaptive", ""),
            "loader": ([IMAGES], ""),
            "forward": (None, "None"),
            "batches": (None, "None, 3, 1e9"),
            "samples": (16, "1e9"),
            "steps": (2, "3"),
            "seed": (0, "-1, 0, 3, 1e9"),
            "progress": (False, "True"),
        },
    ),
    "update_stats": (
        normswap.update_stats,
        {
            "model": ("converted", ""),
            "loader": ([(IMAGES, LABELS)], ""),
            "labels": (1, "-1"),
            "forward": (None, "None"),
            "batches": (None, "None, 3, 1e9"),
            "progress": (False, "True"),
        },
    ),
    "save": (normswap.save, {"model": ("converted", ""), "state": ("all", "")}),
    "load": (
        normswap.load,
        {
            "base": ("base", ""),
            "folder": ("saved", "''"),  # where the test runs
            "inplace": (False, "True"),
            "check_values": (True, "True"),
        },
    ),
    "add_context": (
        normswap.add_context,
        {
            "model": ("converted", ""),
            "name": ("new", "None, 'ab'"),
            "like": ("pooled", "0"),
            "share": (None, "None"),
            "optimizer": (None, "None"),
        },
    ),
    "remove_context": (
        normswap.remove_context,
        {"model": ("converted", ""), "context": (1, "0"), "optimizer": (None, "None")},
    ),
    "revert": (
        normswap.revert,
        {
            "model": ("converted", ""),
            "context": (0, "None, 0"),
            "discard": (False, ""),
            "inplace": (False, "True"),
        },
    ),
    "specialize": (
        normswap.specialize,
        {"model": ("converted", ""), "context": (0, "0"), "inplace": (False, "True")},
    ),
    "freeze": (
        normswap.freeze,
        {
            "model": ("converted", ""),
            "train": ("norms", ""),
            "stats": ("update", ""),
            "also": ("fc", "None, []"),
        },
    ),
    "param_groups": (
        normswap.param_groups,
        {
            "model": ("converted", ""),
            "lr": (0.1, "0, 3, 1e9, 2.5"),
            "weight_decay": (0.0, "0, 3, 1e9, 2.5"),
            "norm_lr": (None, "None, 0, 3, 1e9, 2.5"),
            "layer_decay": (None, "None"),
        },
    ),
    "set_unknown": (normswap.set_unknown, {"model": ("converted", ""), "unknown": ("pooled", "")}),
    "convert_sync_batchnorm": (
        normswap.convert_sync_batchnorm,
        {"model": ("converted", ""), "process_group": (None, "None"), "others": (False, "True")},
    ),
    "use_context": (
        lambda model, context: normswap.use_context(model, context).__enter__(),
        {"model": ("converted", ""), "context": (0, "None, -1, 0, [], scalar, [None]")},
    ),
    "a forward": (
        lambda context: normswap.convert(BASE, "cn", contexts=2).eval()(IMAGES, context=context),
        {"context": (LABELS, "None, -1, 0, scalar")},
    ),
    "get_method": (normswap.get_method, {"name": ("cn", "")}),
    "Schedule": (
        normswap.Schedule,
        {"p": (0.5, "0"), "active": (1, ""), "num_sites": (2, "3, 1e9, 10**400")},
    ),
    "CrossNorm": (
        normswap.CrossNorm,
        {
            "crop": ("both", ""),
            "instances": (2, ""),
            "beta": (1.0, "3, 1e9, 10**400, 2.5"),
            "p": (0.5, "0"),
        },
    ),
    "SelfNorm": (
        normswap.SelfNorm,
        {"num_features": (4, "3"), "gates": (1, ""), "init": ("identity", "")},
    ),
    "CNSN": (
        normswap.CNSN,
        {"crossnorm": (normswap.CrossNorm(), "module"), "selfnorm": (nn.Identity(), "module")},
    ),
    "ContextNorm": (
        normswap.ContextNorm,
        {
            "num_features": (4, "3"),
            "num_contexts": (2, "3"),
            "eps": (1e-5, "0, 3, 1e9, 10**400, 2.5"),
            "momentum": (0.1, "None, 0"),
            "priors": (None, "None"),
            "unknown": ("pooled", "0"),
            "synced": (False, "True"),
        },
    ),
    "ContextNormX": (
        normswap.ContextNormX,
        {
            "num_features": (4, "3"),
            "num_contexts": (2, "3"),
            "eps": (1e-5, "0, 3, 1e9, 10**400, 2.5"),
            "affine": (True, "True"),
            "priors": (None, "None"),
            "unknown": ("pooled", "0"),
        },
    ),
    "AdaptiveContextNorm": (
        normswap.AdaptiveContextNorm,
        {"num_features": (4, "3"), "components": (2, "3"), "momentum": (0.1, "None, 0")},
    ),
}
torch.manual_seed(0)
BASE = Net().eval()
