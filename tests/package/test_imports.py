"""Data flows one way through the package, and importing it is light."""

import ast
import subprocess
import sys
from pathlib import Path

import normswap

ROOT = Path(normswap.__file__).parent
# A file imports from its own house or from an earlier one.
HOUSES = [
    *("_version", "errors", "util", "functional", "sites", "methods", "contexts", "graph"),
    *("report", "lifecycle", "conversion", "saving", "plot", "api", "testing", "cli", "__main__"),
]
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")
HEAVY = ["timm", "torchvision", "matplotlib", "sklearn", "skimage", "pandas", "PIL", "recipes"]
HEAVY += ["torch._dynamo"]


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Yield the modules of this package that a file imports, wherever in the file."""
    package = ["normswap", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [module]
            if module == "normswap":
                names = [f"normswap.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".") for name in names if name.split(".")[0] == "normswap")


def test_imports_come_from_the_same_house_or_an_earlier_one():
    wrong = [
        f"{path.relative_to(ROOT)} imports {'.'.join(name)}"
        for path in FILES
        for name in imported(path)
        if name[1] not in HOUSES or HOUSES.index(name[1]) > HOUSES.index(part_of(path))
    ]
    assert not wrong


def test_init_only_imports():
    for path in ROOT.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, ast.Import | ast.ImportFrom), path


def test_functional_depends_on_torch_and_the_checks_of_arguments_alone():
    for path in (ROOT / "functional").glob("*.py"):
        assert {".".join(name[1:3]) for name in imported(path) if name[1] != "functional"} <= {
            "errors",
            "util.arguments",
        }


def test_tracing_has_one_door():
    outside = (p for p in FILES if "tracing" not in p.relative_to(ROOT).parts)
    wrong = [
        f"{path.relative_to(ROOT)} imports {'.'.join(name)}"
        for path in outside
        for name in imported(path)
        if name[1:3] == ["graph", "tracing"] and len(name) > 3
    ]
    assert not wrong


def test_graph_knows_no_method():
    for path in (ROOT / "graph").rglob("*.py"):
        assert "methods" not in {name[1] for name in imported(path)}, path


def test_a_method_knows_no_other_method():
    shared = {"augmentation", "base", "layer", "instance", "norm_values"}
    shared |= {"layer_tensors", "registry", "running", "unknown_labels"}
    # CNSN is CrossNorm, then SelfNorm; the others are spread over several files each.
    parts = {
        "selfnorm": {"selfnorm_gate"},
        "cnsn": {"crossnorm", "selfnorm"},
        "cn": {"cn_layer", "cn_tables"},
        "cn_layer": {"cn_tables"},
        "cnx": {"cnx_layer", "cnx_batch"},
        "cnx_batch": {"cnx_layer"},
        "acn": {"acn_layer", "acn_options"},
        "acn_layer": {"acn_options"},
    }
    for path in (ROOT / "methods").glob("*.py"):
        if path.stem == "__init__":
            continue
        names = {name[2] for name in imported(path) if name[1:2] == ["methods"]}
        assert names <= shared | parts.get(path.stem, set()), path


def test_import_is_light_and_quiet_without_numpy():
    # Without NumPy torch warns of itself.
    code = (
        "import sys, warnings; sys.modules['numpy'] = None; warnings.simplefilter('ignore'); "
        "import torch; warnings.simplefilter('error'); before = set(sys.modules); import normswap; "
        f"print([m for m in {HEAVY} if m in sys.modules and m not in before])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_import_of_the_package_needs_torch_and_tabulate_alone():
    allowed = {"torch", "tabulate", "normswap", *sys.stdlib_module_names}
    kernels = ROOT / "functional" / "triton"
    for path in FILES:
        if path.is_relative_to(kernels):
            continue  # imported where a tensor is that they serve
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path
            assert "normswap.functional.triton" not in {".".join(n.split(".")[:3]) for n in names}
