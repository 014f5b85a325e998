"""Methods are found: as files of the package's folder, and as entry points of other packages."""

import subprocess
import sys
from pathlib import Path

import pytest

import normswap
from normswap.methods.registry import GROUP

ROOT = Path(normswap.__file__).parents[1]
METHOD = """
from torch import nn
import normswap
from normswap.methods.base import Method

@normswap.register_method
class Groups(Method):
    name = "group"
    title = "group norm, of another package"
    needs_context = False
    keeps_function = False

    def build(self, site, source, contexts, options):
        return nn.GroupNorm(1, site.num_features)
"""
MODEL = """

def model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
"""


def run(folder, *command):
    """Run Python where the folder's packages are installed too."""
    environment = {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": ""}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=True
    )


def install(folder, package, entry, source=METHOD):
    """Install a package of one module with one entry point."""
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What is said where packages bring methods: good, broken, and of a name that is taken."""
    folder = tmp_path_factory.mktemp("packages")
    install(folder, "other-norms", "group = other_norms", METHOD + MODEL)
    install(folder, "more-norms", "more = more_norms:Groups", METHOD.replace('"group"', '"more"'))
    install(folder, "broken-norms", "broken = broken_norms", "import nothing_there")
    install(folder, "taking-norms", "cn = taking_norms", METHOD.replace('"group"', '"cn"'))
    code = """
import normswap
from normswap.cli import main
from normswap.methods.registry import _REGISTRY
normswap.get_method('cn')
print(*_REGISTRY)
print(*normswap.methods())
for name in ('group', 'more'):
    print(normswap.get_method(name).title)
    main(['inspect', '--source', 'other_norms:model', '--method', name])
print('listed')
main(['methods'])
"""
    return run(folder, "-c", code)


def test_another_packages_method_converts_and_is_listed(found):
    used, _, listed = "".join(found.stdout.splitlines(True)[2:]).partition("listed\n")
    assert used.count("group norm, of another package\n") == 2
    assert used.count("GroupNorm") >= 2
    lines = [line.split()[0] for line in listed.splitlines() if "of another package" in line]
    assert sorted(lines) == ["group", "more"]
    assert "cn-x" in listed


def test_an_entry_point_that_fails_is_a_warning_that_names_its_package(found):
    assert "the method 'broken' of broken-norms is not there" in found.stderr
    assert "ModuleNotFoundError: No module named 'nothing_there'" in found.stderr


def test_a_name_of_this_package_is_not_taken_over(found):
    assert "a method 'cn' is registered already" in found.stderr


def test_every_file_with_a_method_is_found_and_no_entry_point_before_another_name(found):
    before, every = (line.split() for line in found.stdout.splitlines()[:2])
    folder = Path(normswap.__file__).parent / "methods"
    holding = [p for p in folder.glob("*.py") if "\n@register_method\n" in p.read_text()]
    assert len(before) == len(holding)
    assert {"cn", "cn-x"} < set(before)
    assert set(every) == {*before, "group", "more"}
