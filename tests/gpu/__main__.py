"""`python -m tests.gpu --out DIR`: every test marked `gpu`, then times, on one GPU in one call.

DIR/report.md and DIR/report.json are written anew after every step, so that a run cut short still
tells. A step that fails, ends its process or hangs is a line of the report, and the run goes on.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from tests.gpu.journal import Journal
from tests.gpu.report import Report
from tests.gpu.steps import DEVICE
from tests.gpu.supervise import ROOT, Part, run_part

KINDS = ("tests", "layers", "models")
LATE = "tests/gpu/test_inductor.py"
# Runs the cases of kernels in a process of its own; here they are a part.
NESTED = "tests/functional/triton/test_values.py"
MOST_PROCESSES = 12
VERSIONS = ("torch", "triton", "timm", "tabulate", "pytest", "scikit-learn")


def parts(options: argparse.Namespace) -> list[Part]:
    """Return what there is to run, what matters most first."""
    device = options.device
    fixed = {DEVICE: device}
    marked = sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text(encoding="utf-8")
    )
    # Its own settings, with the tests' own fixtures.
    every = [
        *(sys.executable, "-m", "pytest", "-c", "tests/gpu/pytest.ini", "--rootdir", "."),
        *("--confcutdir", ".", "-p", "tests.gpu.plugin"),
        *("--continue-on-collection-errors", *(["-k", options.select] if options.select else [])),
    ]
    pytest = [*every, "-m", "gpu"]
    cases = sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests/functional/triton").glob("cases*.py")
    )
    compiled = {**fixed, "TRITON_INTERPRET": str(int(device == "cpu"))}
    bench = [sys.executable, "-m", "tests.gpu.bench", "--device", device]
    early = [path for path in marked if path not in (LATE, NESTED)]
    plain = {**fixed, "NORMSWAP_TRITON": "0"}
    return [
        Part("tests-eager", [*pytest, *early], 0.45, 60, fixed, splits=True),
        Part("tests-kernels", [*every, *cases], 0.4, 60, compiled, splits=True),
        Part("tests-without-triton", [*pytest, "tests/gpu/test_layers.py"], 0.2, 60, plain, True),
        Part("layers-all", [*bench, "layers"], 0.35, 60, fixed),
        Part("models-all", [*bench, "models"], 0.75, 90, fixed),
        Part("layers-without-triton", [*bench, "layers", "--eager"], 0.3, 60, plain),
        Part("tests-compiled", [*pytest, LATE], 0.6, 120, fixed, splits=True),
        Part("models-compiled", [*bench, "models-compiled"], 1.0, 300, fixed),
    ]


def environment(device: str) -> dict[str, str]:
    """Return what the figures depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    found = {"device": device, "commit": commit.stdout.strip() or "unknown"}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(torch.device(device))
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    found["Python"] = platform.python_version()
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder for the report")
    add("--minutes", type=float, default=8, help="after which what is left is not run (8)")
    add("--only", metavar="PART", help=f"one part by its name, or all {', '.join(KINDS)}")
    add("--select", metavar="EXPRESSION", help="of the tests, those that pytest -k selects")
    many = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))
    add("--processes", type=int, default=many, metavar="N", help=f"that test at once ({many})")
    add("--device", default="cuda", help="cpu rehearses the run with small inputs")
    options = parser.parse_args(argv)
    if options.processes < 1:
        parser.error(f"expected --processes of 1 or more, got {options.processes}")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --device cpu rehearses the run")
    chosen = [p for p in parts(options) if options.only in (None, p.name, p.name.split("-")[0])]
    if not chosen:
        names = [*KINDS, *(part.name for part in parts(options))]
        parser.error(f"expected --only of {', '.join(names)}, got {options.only}")
    if options.out.exists():
        parser.error(f"{options.out} exists; expected a new folder")
    deadline = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True)
    report = Report(options.out, environment(options.device))
    report.write()
    for part in chosen:
        if "pytest" in part.command and importlib.util.find_spec("pytest") is None:
            report.refused[part.name] = "pytest is not installed"
            continue
        print(f"{time.monotonic() - report.begin:.0f} s: {part.name}", flush=True)
        shares = part.shares(options.processes)
        names = [f"{part.name}-{i}" for i in range(len(shares))] if shares[1:] else [part.name]
        journals = [Journal(options.out / f"{name}.jsonl") for name in names]
        report.parts[part.name] = journals
        with ThreadPoolExecutor(len(shares)) as pool:
            run = partial(run_part, deadline=deadline, changed=report.write)
            list(pool.map(run, shares, journals))
    report.write()
    print((options.out / "report.md").read_text(encoding="utf-8"))
    return int(report.has_failed())


if __name__ == "__main__":
    sys.exit(main())
