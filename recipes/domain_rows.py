"""What the trainings of `domains` come to: a row a method and kind of label."""

from statistics import mean
from typing import Any

JOINT = "none"  # held out of a training of all domains


def tabulated(
    records: list[dict[str, Any]], epochs: list[dict[str, Any]], reach: float
) -> list[dict[str, Any]]:
    """Give one record a method, kind of label and seed, with the domains as its figures.

    A held-out domain's figure is of the training it was held out of; `trained` is the mean over
    those trainings of the trained domains' own test images. For joint trainings also: `first`, the
    mean after the first epoch, and `reached`, the first epoch with a mean of `reach` or more.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for record in records:
        held, method, seed = (record["cell"][key] for key in ("held_out", "method", "seed"))
        for kind, accuracy in record["accuracy"].items():
            if held != JOINT and held not in accuracy:
                continue
            name = f"{method}, {kind}" if kind else method
            row = rows.setdefault(
                (name, seed), {"cell": {"method": name, "seed": seed}, "held": {}, "own": []}
            )
            if held == JOINT:
                row["held"] = accuracy
                curve = [
                    mean(e["accuracy"][kind].values())
                    for e in epochs
                    if e["cell"] == record["cell"]
                ]
                row["first"] = curve[0]
                row["reached"] = next((i for i, a in enumerate(curve, 1) if a >= reach), None)
            else:
                row["held"][held] = accuracy[held]
                own = record["accuracy"].get("label known", accuracy)
                row["own"].append(mean(a for d, a in own.items() if d != held))
    for row in rows.values():
        row.update(row["held"])
        row["mean"] = mean(row["held"].values())
        row["trained"] = mean(row["own"]) if row["own"] else None
    return list(rows.values())
