"""Code in the documents runs: Python as it stands, commands too where they are quick.

Long commands are read by their own parser and go no further; those in `GATE` are the gate itself.
"""

import argparse
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
import types

import pytest

import normswap
from normswap.cli.main import main
from normswap.methods import registry
from normswap.testing import check_method, method_checks
from tests.recipes.test_examples import EXAMPLES
from tests.support.documents import BLOCK, ROOT, blocks

GUIDES = ["README.md", "recipes/README.md", "normswap/README.md", ".github/CONTRIBUTING.md"]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("", ".github", "normswap", "recipes", "tests")
    for path in (ROOT / folder).glob("*.md")
    if path.name != "CHANGELOG.md"
)
# What `.ci/run` runs, or is.
GATE = {"pip", "pytest", "ruff", "mypy", "bash"}
# Of the contract; together half of its time.
SLOW_CHECKS = {"compiles_into_one_graph", "exports"}
# Whose arguments are parsed.
PROGRAMS = {
    "recipes": "recipes.__main__",
    "tests.bench": "tests.bench.__main__",
    "tests.gpu": "tests.gpu.__main__",
    "tests.graph.fuzz": "tests.graph.fuzz.__main__",
    "tests.sweep": "tests.sweep.command",
    "tests.sweep.libraries": "tests.sweep.libraries",
}


class Parsed(Exception):
    """A parser took its arguments."""


def commands(document):
    """Yield each command of the blocks as words, without comments."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def commands_in_sentences(text):
    """Yield program and arguments of each command ``-m PROGRAM ARGUMENTS`` within a text."""
    for span in re.findall(r"`([^`]*)`", BLOCK.sub("", text).replace("\n", " ")):
        if re.search(r"-m (recipes|tests[.\w]*) \S", span) and not re.search(r"NAME|\.\.\.", span):
            yield shlex.split(span.partition("-m ")[2])


def check_arguments(program, *arguments):
    with pytest.raises(Parsed):
        importlib.import_module(PROGRAMS[program]).main(list(arguments))


@pytest.fixture
def only_parse(monkeypatch):
    """Stop each command where its arguments are read; what they do not know still is an error."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_of_a_language_that_is_tested(document):
    found = BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    others = [code for name, code in found if name not in ("python", "bash", "console")]
    # The house, whose rooms are looked up below.
    assert all(code.startswith("normswap/\n") for code in others)


@pytest.fixture
def run_blocks(tmp_path, monkeypatch):
    """Run the blocks of a document in order; return the names of the methods they register."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # What the blocks register is gone after them.
    monkeypatch.setattr(
        registry, "_REGISTRY", {n: registry.get_method(n) for n in registry.methods()}
    )
    module, before = types.ModuleType("readme"), set(normswap.methods())
    monkeypatch.setitem(sys.modules, "readme", module)  # where pickle finds its classes

    def run(document):
        for number, code in enumerate(blocks(document, "python"), 1):
            exec(compile(code, f"{document}, block {number}", "exec"), vars(module))
        return set(normswap.methods()) - before

    return run


runs_blocks = pytest.mark.filterwarnings(
    "ignore::Warning:lightning", "ignore::normswap.errors.ContextWarning"
)


@runs_blocks
@pytest.mark.parametrize("document", GUIDES)
def test_python_blocks_run_in_order(document, run_blocks):
    for method in run_blocks(document):
        for check in method_checks(method):
            if check.name not in SLOW_CHECKS:
                check()


@runs_blocks
@pytest.mark.exhaustive
@pytest.mark.parametrize("document", GUIDES)
def test_methods_of_python_blocks_pass_every_check(document, run_blocks):
    for method in run_blocks(document):
        check_method(method)


@pytest.mark.parametrize("document", GUIDES)
def test_console_blocks_print_what_they_say(document, capsys):
    for block in blocks(document, "console"):
        command, _, expected = block.partition("\n")
        program, *arguments = shlex.split(command.removeprefix("$ "))
        assert program == "normswap"
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert [line for line in expected.splitlines() if line not in printed.splitlines()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shell_blocks_run_or_parse(document, only_parse, tmp_path):
    for words in commands(document):
        program = words[words.index("-m") + 1] if "-m" in words[:-1] else None
        if program in PROGRAMS:
            if words[-1] != program:
                check_arguments(*words[words.index(program) :])
        elif "recipes.examples." in words[-1]:
            assert words[-1].rpartition(".")[2] in EXAMPLES  # whose tests run them
        elif words[0] == "python":
            path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *words[1:]], check=True, cwd=tmp_path, env=path)
        else:
            assert words[0] in GATE, words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_sentences_parse(document, only_parse):
    for words in commands_in_sentences((ROOT / document).read_text(encoding="utf-8")):
        check_arguments(*words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (ROOT / document).parent.joinpath(target).exists()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    folders = [ROOT, ROOT / "normswap", (ROOT / document).parent]
    for name in re.findall(r"`(?:pytest )?([\w./]+\.py)`", text):
        assert any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_of_the_package_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for dotted in re.findall(r"`normswap\.([a-zA-Z_.]+)\b(?!\.md)", text):
        pkgutil.resolve_name(f"normswap.{dotted}")


def test_every_room_of_the_house_is_shown():
    house = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "normswap").glob("*/**/__init__.py")}
    assert {room for room in rooms if f"  {room}/ " not in house} == set()


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
