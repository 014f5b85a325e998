"""`python -m recipes results`: the tables of RESULTS.md, made from the runs that are kept.

    python -m recipes results                      rewrite the tables in RESULTS.md
    python -m recipes results --keep runs/sensors  keep a finished run, or put it in place of one
    python -m recipes results --draw DIR           draw a picture of each into a folder

`recipes/kept/NAME.json` holds the figures of each method and seed of one run, its command and
versions. In RESULTS.md `<!-- table NAME -->` says where its table stands, up to `<!-- end -->`.
"""

import json
import re
import shlex
from argparse import Namespace
from pathlib import Path

from .common import runs
from .common.errors import check
from .common.options import Parser
from .common.reports import TABLE, Report

HERE = Path(__file__).parent
KEPT, PAGE = HERE / "kept", HERE / "RESULTS.md"
PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def run(options: Namespace) -> None:
    check(options.page.is_file(), f"expected a page with tables, found none at {options.page}")
    if options.keep is not None:
        keep(options.keep, options.kept, options.name or options.keep.name)
    reports = {path.stem: read(path) for path in sorted(options.kept.glob("*.json"))}
    page = options.page.read_text(encoding="utf-8")
    runs.write_text(options.page, filled(page, reports))
    for name, (report, _) in reports.items() if options.draw else ():
        options.draw.mkdir(parents=True, exist_ok=True)
        report.draw(options.draw / f"{name}.png")
    print(f"{options.page}: tables of {', '.join(reports) or 'no run'}")


def keep(folder: Path, kept: Path, name: str) -> None:
    """Copy what the table of a finished run is made of; paths become their last part."""
    path = folder / TABLE
    check(path.exists(), f"expected a finished run with {TABLE} in it, got {folder}")
    with runs.reading(path, "run the same again with --resume, which writes it anew"):
        found = json.loads(path.read_text(encoding="utf-8"))
        found["versions"]["command"] = without_places(found["versions"]["command"])
        rounded = [
            {k: round(value, 4) if isinstance(value, float) else value for k, value in r.items()}
            for r in found.pop("records")
        ]
    records = ",\n".join(map(json.dumps, rounded))
    text = json.dumps(found, indent=1)[:-2] + f',\n "records": [\n{records}\n]\n}}\n'
    kept.mkdir(parents=True, exist_ok=True)
    runs.write_text(kept / f"{name}.json", text)


def without_places(command: str) -> str:
    """Leave out where a run went and how many ran at once; of paths, all but the last part."""
    words = shlex.split(re.sub(r"(?<= )(--[\w-]+)=", r"\1 ", command))
    kept, rest = [], iter(words)
    for word in rest:
        if word in ("--out", "--name", "--jobs"):
            next(rest, None)
        elif word != "--resume":
            kept.append(word.rstrip("/").rpartition("/")[2])
    return shlex.join(kept)


def read(path: Path) -> tuple[Report, str]:
    """Read a kept run; give its report, and the text of its place on the page."""
    way_out = "keep its run again with --keep, or delete it and its place on the page"
    with runs.reading(path, way_out):
        found = json.loads(path.read_text(encoding="utf-8"))
        versions = found.pop("versions")
        report = Report(**found)
        shown = {k: v for k, v in versions.items() if k not in ("command", "threads", "cpu")}
        made = ", ".join(f"{k} {v}" for k, v in shown.items())
        return report, f"`{versions['command']}` ({made})\n\n{report.table()}\n"


def filled(page: str, reports: dict[str, tuple[Report, str]]) -> str:
    missing = ", ".join(name for _, name, _ in PLACE.findall(page) if name not in reports)
    way_out = "keep one with python -m recipes results --keep RUN --name NAME"
    check(not missing, f"expected a kept run for each table, got none for {missing}; {way_out}")
    return PLACE.sub(lambda found: found[1] + reports[found[2]][1] + found[3], page)


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--keep", type=Path, metavar="RUN", help="a finished run, such as runs/sensors")
    add("--name", help="under which it is kept, instead of its folder's")
    add("--draw", type=Path, metavar="DIR", help="a folder for the pictures")
    add("--page", type=Path, default=PAGE, help="the page with the tables")
    add("--kept", type=Path, default=KEPT, help="the folder of kept runs")
