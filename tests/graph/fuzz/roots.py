"""Leaves, forwards of whole models and how they are called, and changes to any model."""

LEAVES = [
    "Block()",
    "nn.BatchNorm2d(4)",
    "nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())",
]
# Parameters of the model's forward, how `x` comes out of them, what it returns, how it is called.
ROOTS = [
    ("x", "", "x", ["model(x, **given)", "model(x=x, **given)"]),
    (
        "x, extra=None",
        "x = x if extra is None else x + extra",
        "x",
        ["model(x, **given)", "model(x, x * 2, **given)", "model(x, extra=x, **given)"],
    ),
    (
        "x, *, scale=1.0",
        "x = x * scale",
        "x",
        ["model(x, **given)", "model(x, scale=2.0, **given)"],
    ),
    (
        "x, *rest, **options",
        "x = sum(rest, x) * options.get('s', 1.0)",
        "x",
        ["model(x, **given)", "model(x, x, **given)", "model(x, s=2.0, **given)"],
    ),
    (
        "x, flag=True",
        "x = x if flag else x * 2",
        "x",
        ["model(x, **given)", "model(x, False, **given)"],
    ),
    (
        "x, n=1",
        "x = x * n",
        "x",
        ["model(x, **given)", "model(x, 2, **given)", "model(x, n=3, **given)"],
    ),
    (
        "x, how='a'",
        "x = x if how == 'a' else x * 2",
        "x",
        ["model(x, **given)", "model(x, how='b', **given)"],
    ),
    (
        "batch",
        "x = batch['x']",
        "x",
        ["model({'x': x}, **given)", "model(dict(x=x, y=1), **given)"],
    ),
    ("batch", "x = batch['x']", "{**batch, 'y': x}", ["model({'x': x}, **given)"]),
    (
        "batch",
        "x = batch['x']\nbatch['n'] = x.shape[-1]",
        "batch.update(y=x) or batch",
        ["model({'x': x}, **given)"],
    ),
    (
        "xs",
        "x = xs[0] + xs[-1]",
        "[x, xs[0]]",
        ["model([x, x * 2], **given)", "model((x,), **given)"],
    ),
    ("pair", "x = pair.first", "Pair(x, pair.second)", ["model(ns.Pair(x, 3), **given)"]),
    ("data", "x = data.x * data.n", "Data(x, 2)", ["model(ns.Data(x, 3), **given)"]),
    ("x", "", "(x, None, {'a': x.mean((2, 3))})", ["model(x, **given)"]),
    ("x", "", "Pair(x, self.training)", ["model(x, **given)"]),
    (
        "x, mask=None",
        "if mask is not None:\n    x = x * mask",
        "x",
        ["model(x, **given)", "model(x, x > 0, **given)"],
    ),
    (
        "x, out=None",
        "",
        "(out.append(x) or out) if out is not None else x",
        ["model(x, **given)", "model(x, [], **given)"],
    ),
    (
        "x, context=None",
        "x = x if context is None else x + context",
        "x",
        ["model(x, **given)", "model(x, context=x * 2, **given)"],
    ),
]
WRAPPED = [
    "model.c0 = nn.Sequential(model.c0)",
    "model.c0 = ns.Wrapper(model.c0)",
    "model.c0 = ns.Wrapper(nn.Sequential(model.c0, nn.Identity()))",
    "model.c0 = checkpoint_wrapper(model.c0)",
]
COMPILED = "model.c0 = torch.compile(model.c0, backend='eager')"
CHANGED = [
    "model.train(not model.training)",
    "next(m for m in model.modules() if 'Norm' in type(m).__name__).eval()",
    "model.requires_grad_(False)",
]
