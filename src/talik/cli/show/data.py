"""Lines about data that were read, and about their chat template."""

from __future__ import annotations

from talik.data.dataset import Data
from talik.data.report import Report

COUNTS = {
    "ends_added": "{} examples got an end token: the template writes no end of turn",
    "boundary_merged": "{} examples have a token that spans prompt and answer",
    "split_turns": "{} conversations became several examples: the template rewrites earlier answers",
    "thoughts": "{} answers keep reasoning that the template drops, or close a thought that the prompt opens",
    "quoted": "{} examples have control tokens as ordinary text",
    "developers": "{} developer messages became system messages: the template does not know the role",
    "pieces": "{} examples are pieces of documents",
}


def data_lines(data: Data) -> list[str]:
    """The counts of a data set: examples, tokens, what was dropped or cut."""
    report = data.report
    lines = [
        f"{data.path}: {report.rows:,} rows for {data.use}, format {data.format}; "
        f"template: {report.template}",
        f"{report.examples:,} examples, {report.tokens:,} tokens, {report.trained_tokens:,} of them trained; "
        f"the longest has {report.longest:,}",
    ]
    for kind, counted in report.too_long.items():
        if counted.count:
            places = ", ".join(map(str, counted.places[:3])) + (", ..." if counted.count > 3 else "")
            lines.append(f"longer than --max-length: {counted.count:,} x {kind} ({places})")
    if report.dropped or report.cut:
        lines.append(f"{report.dropped:,} examples dropped, {report.cut:,} cut (--too-long)")
    if report.tails_cut:
        lines.append(
            f"{report.tails_cut:,} examples cut behind their last trained token, where nothing is lost"
        )
    lines += [text.format(f"{count:,}") for name, text in COUNTS.items() if (count := getattr(report, name))]
    if len(data.sources) > 1:
        lines += [
            f"{source.path}: {source.examples:,} examples, {source.tokens:,} tokens, "
            f"{100 * source.trained_tokens / max(1, report.trained_tokens):.1f} % of the trained ones"
            for source in data.sources
        ]
    if data.problems:
        kinds = ", ".join(f"{kind}: {count:,}" for kind, count in data.problems.items())
        lines.append(f"{sum(data.problems.values()):,} rows cannot be used and are left out ({kinds})")
    if data.media:
        lines.append(f"{data.media:,} rows with pictures, video or sound are left out (--drop-media)")
    if data.unread:
        lines.append(
            "not used: " + ", ".join(f"{name} ({count:,} rows)" for name, count in data.unread.items())
        )
    return lines


def template_lines(report: Report) -> list[str]:
    """Facts about a chat template."""
    return [f"template: {line}" for line in report.facts.lines()] if report.facts else []
