"""What a conversion did or would do, as rows that print as text or markdown, or go to a table."""

import html
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate


@dataclass
class Row:
    """One normalisation layer, or one place of an inserted layer.

    Attributes:
        fqn: its qualified name.
        aliases: its further names.
        source: class it had.
        target: class it has; "" where it was left alone.
        action: "replaced", "inserted", "kept" (not selected) or "refused".
        reason: why it was not replaced; for an inserted layer, how its place was recognised.
        layer: name of the inserted layer.
        channels: C.
        contexts: K; 0 where it was left alone, and for a method without contexts.
        components: how many its layer has, where that is no number of contexts.
        delivery: how the context gets there: "threaded", as an argument in the graph of the module
            that calls it; "scoped"; or "unreached".
        rows: how the rows it is given follow from the samples, as was measured: "one per sample",
            "folded x49" (each sample's rows together), "repeated x2" (all samples, then again),
            "permuted", or why labels cannot follow; "not measured" and why.
        parameters_before, parameters_after: number of trainable and frozen parameters.
        statistics: what became of the running statistics.
        divergence: how far apart the statistics of contexts or components are, in nats; None where
            there are none.
    """

    fqn: str
    source: str
    action: str
    aliases: tuple[str, ...] = ()
    target: str = ""
    reason: str = ""
    channels: int = 0
    contexts: int = 0
    delivery: str = ""
    rows: str = ""
    parameters_before: int = 0
    parameters_after: int = 0
    statistics: str = ""
    divergence: float | None = None
    components: int = 0
    layer: str = ""


@dataclass
class Verification:
    """Largest difference between the outputs before and after conversion, in eval mode.

    Attributes:
        differences: what was given as context -> largest absolute difference.
        scale: largest absolute output.
        reason: why nothing, or not everything asked for, was compared; "" where it was.
        keeps: whether the method promises that there is none but rounding.
    """

    differences: dict[str, float] = field(default_factory=dict)
    scale: float = 0.0
    reason: str = ""
    keeps: bool = True

    @property
    def largest(self) -> float:
        """The largest difference over everything compared; NaN, which is below nothing, if none."""
        return math.nan if self.reason else max(self.differences.values(), default=math.nan)

    def __str__(self) -> str:
        """One line."""
        if self.reason:
            return f"not verified: {self.reason}"
        parts = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
        lead = "" if self.keeps else "does not keep the function: "
        return f"{lead}largest output difference (outputs up to {self.scale:.3g}): {parts}"


@dataclass
class Report:
    """A plan, or a summary of a converted model: a text table by ``str``, a table in a notebook."""

    model: str
    method: str
    contexts: tuple[str, ...]
    priors: tuple[float, ...]
    unknown: str
    rows: list[Row]
    opaque: dict[str, str] = field(default_factory=dict)
    traced: int = 0
    norm_reads: list[str] = field(default_factory=list)
    verification: Verification | None = None
    options: dict[str, Any] = field(default_factory=dict)
    argument: str | None = None
    parameters: int = 0
    trainable: int = 0

    def count(self, **where: Any) -> int:
        """Return the number of rows whose attributes have these values."""
        return sum(all(getattr(r, k) == v for k, v in where.items()) for r in self.rows)

    def records(self) -> list[dict[str, Any]]:
        """Return one flat dict a row, as ``pandas.DataFrame(report.records())`` takes."""
        return [{**asdict(row), "aliases": ", ".join(row.aliases)} for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as nested dicts and lists, ready for JSON."""
        return asdict(self)

    def markdown(self, most: int | None = None) -> str:
        """Return the table and its heading in Markdown; at most `most` rows."""
        return f"{self.heading()}\n\n{self._table('github', most)}"

    def text(self, most: int | None = None) -> str:
        """Return the table and its heading as text; at most `most` rows."""
        return f"{self.heading()}\n\n{self._table('simple', most)}"

    def __str__(self) -> str:
        """Return the whole text."""
        return self.text()

    def _repr_html_(self) -> str:
        """Return the whole as notebooks show it."""
        return f"<pre>{html.escape(self.heading())}</pre>\n{self._table('html', None)}"

    def heading(self) -> str:
        """Return the lines above the table."""
        lines = [f"{self.model}: {', '.join([self.method, *self._settings()])}", self._counts()]
        before = sum(r.parameters_before for r in self.rows if r.action == "replaced")
        after = sum(r.parameters_after for r in self.rows if r.action in ("replaced", "inserted"))
        lines.append(f"parameters of these layers: {before:,} -> {after:,}")
        if self.traced or self.opaque:
            lines[-1] += (
                f"; containers: {self.traced} traced, {len(self.opaque)} with their own forward"
            )
        lines.append(f"trainable parameters: {self.trainable:,} of {self.parameters:,}")
        lines += [f"own forward: {name or '(root)'}: {why}" for name, why in self.opaque.items()]
        if self.argument not in (None, "context"):
            lines.append(f"labels: {self.argument}=, since the model takes a context= of its own")
        if self.norm_reads:
            lines.append(
                f"read past the norm: {', '.join(self.norm_reads[:6])}; "
                "such code now sees one row a context"
            )
        if self.verification is not None:
            lines.append(str(self.verification))
        return "\n".join(lines)

    def _settings(self) -> list[str]:
        settings = [
            f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.options.items()
        ]
        if not self.contexts:
            return settings
        shown = ", ".join(self.contexts[:12]) + (", ..." if len(self.contexts) > 12 else "")
        count = f"{len(self.contexts)} context(s): {shown}; unknown labels: {self.unknown}"
        return [*settings, count]

    def _counts(self) -> str:
        rest = f"{self.count(action='kept')} kept, {self.count(action='refused')} refused"
        if self.count(action="inserted"):
            return (
                f"places: {len(self.rows)} found, {self.count(action='inserted')} given a layer, "
                + rest
            )
        counts = f"norms: {len(self.rows)} found, {self.count(action='replaced')} replaced"
        if self.contexts:
            counts += (
                f" ({self.count(delivery='threaded')} threaded, "
                f"{self.count(delivery='scoped')} scoped, "
                f"{self.count(delivery='unreached')} reached by no forward)"
            )
        return f"{counts}, {rest}"

    def _table(self, style: str, most: int | None) -> str:
        columns: list[tuple[str, Any]] = [
            (
                "place" if self.count(action="inserted") else "norm",
                lambda r: " = ".join((r.fqn or "(root)", *r.aliases)),
            ),
            ("was", lambda r: r.source),
            ("is", lambda r: r.target or r.action),
            ("channels", lambda r: r.channels or ""),
            ("context", lambda r: r.delivery),
            ("rows", lambda r: r.rows),
            ("components", lambda r: r.components or ""),
            ("parameters", lambda r: f"{r.parameters_before} -> {r.parameters_after}"),
            ("statistics", lambda r: r.statistics),
            ("divergence", lambda r: "" if r.divergence is None else f"{r.divergence:.3g}"),
            ("reason", lambda r: r.reason),
        ]
        shown = self.rows if most is None else self.rows[:most]
        cells = [[cell(row) for _, cell in columns] for row in shown]
        keep = [i for i in range(len(columns)) if any(row[i] != "" for row in cells)]
        table = tabulate(
            [[row[i] for i in keep] for row in cells],
            headers=[columns[i][0] for i in keep],
            tablefmt=style,
            disable_numparse=True,
        )
        left = len(self.rows) - len(shown)
        return f"{table}\n... and {left} more" if left else table
