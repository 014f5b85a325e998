"""What a sweep found: totals on top, then whatever is not right, then the slow and the opaque."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from tabulate import tabulate

# In the order they are told; the first three are what a sweep hopes for.
STATUSES = {
    "ok": "converted and equal to the original in every check",
    "planned": "planned on the meta device, as asked; nothing was run",
    "no norms": "no batch or instance norm",
    "wrong": "converted, but not equal to the original",
    "undecided": "converted, equal as far as could be checked",
    "structure only": "converted on the meta device; too large to run",
    "refused": "normswap refused to convert it",
    "failed": "something raised",
    "timeout": "took too long",
    "crashed": "ended its process",
}
FINE = ("ok", "planned", "no norms")
_SLOWEST = 10


def summarise(records: list[dict[str, Any]], expected: int) -> dict[str, Any]:
    """Give the totals of a sweep, by method.

    Args:
        records: the results.
        expected: how many there are once the sweep is complete.
    """
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_method[record["method"]].append(record)
    return {
        "complete": len(records) == expected,
        "done": len(records),
        "expected": expected,
        "methods": {method: _totals(rows) for method, rows in sorted(by_method.items())},
    }


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    with_norms = [r for r in rows if r["status"] != "no norms"]
    converted = [r for r in with_norms if "replaced" in r and r["status"] != "refused"]

    def total(key: str) -> int:
        return sum(r.get(key, 0) for r in converted)

    timed = list(filter(is_timed, converted))
    slow = [r for r in timed if r["convert_seconds"] > allowance(r)]
    return {
        "architectures": len(rows),
        "with norms": len(with_norms),
        "converted": len(converted),
        **{status: sum(r["status"] == status for r in rows) for status in STATUSES},
        "norms": total("found"),
        "replaced": total("replaced"),
        "inserted": total("inserted"),
        "threaded": total("threaded"),
        "scoped": total("scoped"),
        "unreached": total("unreached"),
        "refused norms": sum(sum(r.get("refused", {}).values()) for r in converted),
        "checked in float64": sum(r.get("dtype") == "float64" for r in converted),
        "checked with fewer blocks": sum(r.get("check") == "reduced" for r in converted),
        "largest difference": max(
            (v for r in converted for k, v in r.get("numbers", {}).items() if k not in COUNTS),
            default=0.0,
        ),
        "conversion seconds": round(sum(r["convert_seconds"] for r in timed), 2),
        "slower than allowed": len(slow),
    }


# Numbers of a record that are no differences.
COUNTS = ("effect", "moved", "without gradient")


def allowance(record: dict[str, Any]) -> float:
    """Give the seconds a conversion may take: 3 times timm's own, and 2 ms a container."""
    containers = record.get("traced", 0) + len(record.get("opaque", []))
    return 3 * float(record["sync_seconds"]) + 0.002 * containers


def is_timed(record: dict[str, Any]) -> bool:
    """Say whether all of a model was converted with a clock beside it."""
    return record.get("check") == "full" and "sync_seconds" in record and "replaced" in record


def is_right(summary: dict[str, Any]) -> bool:
    """Say whether a sweep is complete and everything in it is right."""
    bad = [s for s in STATUSES if s not in FINE]
    return summary["complete"] and not any(
        totals[status] for totals in summary["methods"].values() for status in bad
    )


def to_json(
    summary: dict[str, Any], records: list[dict[str, Any]], config: dict[str, Any], command: str
) -> dict[str, Any]:
    """Give everything, ready for JSON."""
    return {"command": command, **config, "summary": summary, "results": records}


def to_markdown(
    summary: dict[str, Any], records: list[dict[str, Any]], config: dict[str, Any], command: str
) -> str:
    """Write the report."""
    made = ", ".join(f"{name} {value}" for name, value in config["versions"].items())
    lines = [f"# Sweep: {command}", "", f"{made}.", ""]
    if not summary["complete"]:
        lines += [f"**Incomplete: {summary['done']} of {summary['expected']} results.**", ""]
    lines += [_table_of_totals(summary), ""]
    lines += _problems(records)
    lines += _opaque(records)
    lines += _refused_norms(records)
    lines += _unreached(records)
    lines += _slowest(records)
    return "\n".join(lines).rstrip() + "\n"


def share(part: int, whole: int) -> str:
    """Write a count with its share; 100.00 % only where all is meant."""
    if not whole:
        return f"{part}"
    percent = min(100 * part / whole, 100.0 if part == whole else 99.99)
    return f"{part:,} of {whole:,} ({percent:.2f} %)"


def _table_of_totals(summary: dict[str, Any]) -> str:
    rows = []
    for method, t in summary["methods"].items():
        sites = t["threaded"] + t["scoped"] + t["unreached"]
        rows.append(
            {
                "method": method,
                "architectures": t["architectures"],
                "with norms": t["with norms"],
                "converted": share(t["converted"], t["with norms"]),
                **{s: t[s] for s in STATUSES if t[s] and s != "no norms"},
                "wrong": t["wrong"],
                "norms swapped": share(t["replaced"], t["norms"]) if t["replaced"] else "-",
                **({"layers inserted": t["inserted"]} if t["inserted"] else {}),
                "sites threaded": share(t["threaded"], sites) if sites else "-",
                "scoped": t["scoped"],
                "reached by no forward": t["unreached"],
                "checked in float64": t["checked in float64"],
                "checked with fewer blocks": t["checked with fewer blocks"],
                "largest relative difference": f"{t['largest difference']:.1e}",
                "conversion, CPU s": t["conversion seconds"],
                "slower than 3 x SyncBatchNorm + 2 ms a container": t["slower than allowed"],
            }
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[name, *(row.get(name, 0) for row in rows)] for name in names if name != "method"]
    headings = ["", *(row["method"] for row in rows)]
    return tabulate(cells, headings, tablefmt="github", disable_numparse=True)


def _problems(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for status, meaning in STATUSES.items():
        rows = [r for r in records if r["status"] == status]
        if status in FINE or not rows:
            continue
        lines += [f"## {len(rows)} {status}: {meaning}", ""]
        for r in sorted(rows, key=lambda r: (r["model"], r["method"])):
            why = [*r.get("problems", []), *r.get("doubts", [])]
            stage = f"{r['stage']}: " if "stage" in r else ""
            why += [stage + r["error"]] if "error" in r else []
            lines.append(f"- {r['model']} ({r['method']}): {'; '.join(why)}")
        lines.append("")
    return lines


def _opaque(records: list[dict[str, Any]]) -> list[str]:
    sites: Counter[tuple[str, str]] = Counter()
    containers: Counter[tuple[str, str]] = Counter()
    models: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        for item in record.get("opaque", []):
            key = item["class"], item["reason"]
            sites[key] += item["sites"]
            containers[key] += 1
            models[key].add(record["model"])
    if not sites:
        return []
    rows = [
        [number, containers[key], len(models[key]), min(models[key]), *key]
        for key, number in sites.most_common()
    ]
    headings = ["norms below", "containers", "models", "such as", "class", "reason"]
    return [
        "## Containers that keep their own forward",
        "",
        tabulate(rows, headings, tablefmt="github"),
        "",
    ]


def _refused_norms(records: list[dict[str, Any]]) -> list[str]:
    counts: Counter[str] = Counter()
    models: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for why, number in record.get("refused", {}).items():
            counts[why] += number
            models[why].add(record["model"])
    rows = [[n, len(models[why]), min(models[why]), why] for why, n in counts.most_common()]
    if not rows:
        return []
    table = tabulate(rows, ["norms", "models", "such as", "reason"], tablefmt="github")
    return ["## Norms left alone", "", table, ""]


def _unreached(records: list[dict[str, Any]]) -> list[str]:
    rows = [[r["unreached"], r["model"], r["method"]] for r in records if r.get("unreached")]
    if not rows:
        return []
    rows.sort(key=lambda row: (-row[0], *row[1:]))
    table = tabulate(rows, ["norms", "model", "method"], tablefmt="github")
    return ["## Norms that no forward was seen to reach", "", table, ""]


def _slowest(records: list[dict[str, Any]]) -> list[str]:
    timed = list(filter(is_timed, records))
    if not timed:
        return []
    timed.sort(key=lambda r: r["convert_seconds"] / max(allowance(r), 1e-9), reverse=True)
    rows = [
        [
            r["model"],
            r["method"],
            f"{r['convert_seconds']:.2f}",
            f"{allowance(r):.2f}",
            f"{r['sync_seconds']:.3f}",
            r.get("traced", 0) + len(r.get("opaque", [])),
        ]
        for r in timed[:_SLOWEST]
    ]
    headings = ["model", "method", "CPU s", "allowed", "SyncBatchNorm", "containers"]
    table = tabulate(rows, headings, tablefmt="github", disable_numparse=True)
    return ["## Slowest conversions, relative to what is allowed", "", table, ""]
