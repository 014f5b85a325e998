"""`python -m tests.bench`: layers against BatchNorm, whole models, and cost against K as a plot.

`compiled` counts kernels that Inductor writes for a layer on a GPU, and needs none.

Every table is from one process with its cases run in turn; ratios are of medians.
"""

import argparse
from pathlib import Path

import torch
from tabulate import tabulate

from recipes.bench import HEADINGS, bench_model, make_model
from tests.bench.compiled import compiled_rows
from tests.bench.host import measure_host
from tests.bench.layers import BASE, LAYOUTS, SHAPES, bench_layers

MODELS = ("resnet50", "efficientnet_b0")
KINDS = ("layers", "models", "host", "compiled", "plot")
METHODS = ("cn", "cn-x", "selfnorm", "crossnorm")


def print_layers(options: argparse.Namespace, device: torch.device) -> None:
    for training in (True, False):
        columns = {}
        for shape in SHAPES:
            for layout in LAYOUTS:
                columns[f"{shape[-1]} {layout}"] = bench_layers(
                    shape,
                    layout,
                    training,
                    device,
                    options.counts,
                    options.repeats,
                    options.compile,
                    torch.bfloat16 if options.bf16 else torch.float32,
                )
        first = next(iter(columns.values()))
        base = ["BatchNorm2d, ms", *(f"{times[BASE].median:.3g}" for times in columns.values())]
        rows = [
            [name, *(f"{t[name].median / t[BASE].median:.2f}" for t in columns.values())]
            for name in first
            if name != BASE
        ]
        print("\ntraining, forward and backward" if training else "\neval, forward")
        print(tabulate([base, *rows], ["ratio to BatchNorm2d", *columns], disable_numparse=True))


def print_models(options: argparse.Namespace, device: torch.device) -> None:
    for name in MODELS:
        images = torch.randn(16, 3, 128, 128, device=device)
        model = make_model(name).to(device)
        rows = bench_model(
            model, METHODS, images, 4, options.repeats, options.compile, options.bf16
        )
        print(f"\n{name}, batch 16, 128 px")
        print(tabulate(rows, HEADINGS, disable_numparse=True))


def print_host(options: argparse.Namespace) -> None:
    rows = []
    torch.set_num_threads(1)  # what others spend waiting is time of the process, too
    for method in ("cn", "cn-x"):
        for what, (base, time) in measure_host(method, options.repeats).items():
            rows.append([method, what, f"{base:.0f}", f"{time:.0f}", f"{time - base:.0f}"])
    print("\nthe host's part on a GPU, CPU time, us a layer")
    print(tabulate(rows, ["method", "", "BatchNorm2d", "layer", "more"], disable_numparse=True))


def print_compiled() -> None:
    print("\nkernels that Inductor writes: forward + backward of a training step / eval, bfloat16")
    print(
        tabulate(compiled_rows(), ["layer", "contiguous", "channels last"], disable_numparse=True)
    )


def plot_scaling(path: Path, options: argparse.Namespace, device: torch.device) -> None:
    """Draw the cost of a training step of one layer against the number of contexts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = (128, 256, 14, 14)
    times = bench_layers(shape, "ct", True, device, options.counts, options.repeats)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for kind in ("loop", "cn", "cn-x"):
        values = [times[f"{kind} K={k}"].median / times[BASE].median for k in options.counts]
        axes.plot(options.counts, values, marker="o", label=kind)
    axes.axhline(1, color="grey", linewidth=1, label="BatchNorm2d")
    axes.set(xscale="log", yscale="log", xlabel="contexts K", ylabel="time, BatchNorm2d = 1")
    axes.set_title(f"training step of a layer, input {shape}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"\nwrote {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    add = parser.add_argument
    add("what", nargs="*", metavar="|".join(KINDS), help="all by default")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--counts", type=int, nargs="+", default=[1, 4, 16, 128], metavar="K")
    add("--repeats", type=int, default=20)
    add("--threads", type=int, default=2, help="CPU threads (2)")
    add(
        "--compile",
        action="store_true",
        help="compile all but BatchNorm2d",
    )
    add("--bf16", action="store_true")
    add("--plot", type=Path, default=Path("scaling.png"), help="where the plot goes")
    options = parser.parse_args(argv)
    unknown = sorted({*options.what} - {*KINDS})
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    chosen = options.what or KINDS
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if "layers" in chosen:
        print_layers(options, device)
    if "models" in chosen:
        print_models(options, device)
    if "host" in chosen:
        print_host(options)
    if "compiled" in chosen:
        print_compiled()
    if "plot" in chosen:
        plot_scaling(options.plot, options, device)


if __name__ == "__main__":
    main()
