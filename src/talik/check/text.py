"""What `talik check` found, as text and as a page."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from talik.check.checker import Check, Finding
from talik.data.preview import length_histogram, sections
from talik.data.rows import visible

SHOWN = 10
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Check of the data</title><style>
:root {{ color-scheme: light dark; --line: #8886; --good: #1a7f37; --bad: #cf222e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --good: #3fb950; --bad: #ff7b72; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 70rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; vertical-align: top; padding: .3rem .6rem;
  border-bottom: 1px solid var(--line); }}
td {{ overflow-wrap: anywhere; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }}
.problem th::before {{ content: "\\2716 "; color: var(--bad); }} .note th::before {{ content: "\\2022 "; }}
.trained {{ border-bottom: 3px solid var(--good); font-weight: 600; }} .masked {{ opacity: .75; }}
pre span {{ border: 1px solid var(--line); border-radius: 2px; }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
{findings}
<h2>Numbers</h2>
<table>{numbers}</table>
<h2>Lengths</h2>
<pre style="line-height:1.3">{histogram}</pre>
<h2>Examples</h2>
<p>Trained tokens are <span class="trained">bold and underlined</span>, the others are <span
class="masked">masked</span>. Resting on a token shows its id.</p>
{examples}
</body></html>
"""


def check_text(check: Check) -> str:
    """All kinds of findings with their first places, problems first, and the numbers."""
    lines = [summary(check)]
    for severity, kind, count, found in _groups(check):
        lines += ["", f"{severity}: {kind} ({count:,})"]
        lines += [f"  {place_of(one)}: {visible(one.text)}" for one in found[:SHOWN]]
        if count > SHOWN:
            lines.append(f"  and {count - SHOWN:,} more")
        lines.append(f"  -> {found[0].remedy}" if found else "")
    lines += ["", *(f"{name}: {value}" for name, value in _numbers(check))]
    return "\n".join([*lines, "", length_histogram(check.statistics.lengths)])


def summary(check: Check) -> str:
    """The result in one sentence."""
    notes = sum(check.counts.values()) - check.problems
    if not check.problems:
        return f"{check.rows:,} rows: no problem, {notes:,} notes"
    return f"{check.rows:,} rows: {check.problems:,} problems, {notes:,} notes"


def check_page(check: Check, title: str, tokenizer: Any) -> str:
    """One page that needs no other file and no network."""
    tables = []
    for severity, kind, count, found in _groups(check):
        rows = "".join(
            f"<tr><td>{html.escape(place_of(one))}</td><td>{html.escape(visible(one.text))}</td></tr>"
            for one in found[:200]
        )
        remedy = html.escape(found[0].remedy) if found else ""
        head = f"<tr class='{severity}'><th colspan='2'>{severity}: {html.escape(kind)} ({count:,})</th></tr>"
        tables.append(f"<h2>{html.escape(kind)}</h2><p>{remedy}</p><table>{head}{rows}</table>")
    numbers = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in _numbers(check)
    )
    return PAGE.format(
        title=html.escape(title),
        summary=html.escape(summary(check)),
        findings="\n".join(tables),
        numbers=numbers,
        histogram=html.escape(length_histogram(check.statistics.lengths)),
        examples=sections(check.examples, tokenizer),
    )


def place_of(finding: Finding) -> str:
    """Where a finding is."""
    place = (
        f"{finding.file}:{finding.line}" if finding.unit == "line" else f"{finding.file}: row {finding.line}"
    )
    return visible(place) if finding.field is None else visible(f"{place}:{finding.field}")


def _groups(check: Check) -> Iterator[tuple[str, str, int, list[Finding]]]:
    order = sorted(check.counts.items(), key=lambda item: (item[0][0] != "problem", -item[1]))
    for (severity, kind), count in order:
        found = [one for one in check.findings if (one.severity, one.kind) == (severity, kind)]
        yield severity, kind, count, found


def _numbers(check: Check) -> Iterator[tuple[str, str]]:
    numbers = check.statistics.as_dict()
    yield "examples", f"{numbers['examples']:,}"
    yield "tokens", f"{numbers['tokens']:,}, {100 * numbers['trained_share']:.1f} % of them trained"
    longer = ", ".join(f"{n:,} than {length:,}" for length, n in numbers["examples_longer_than"].items())
    yield "examples longer", longer or "none than 512"
    yield "messages by role", ", ".join(f"{role} {n:,}" for role, n in numbers["roles"].items())
    turns = numbers["answers_in_a_conversation"].items()
    yield "answers in a conversation", ", ".join(f"{n}: {count:,} x" for n, count in turns)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in numbers["scripts"].items())
    yield "scripts", shares
    known = ", ".join(f"{name} {ratio:.1f}" for name, ratio in numbers["bytes_per_token"].items())
    yield "bytes per token", known
    if check.unread:
        yield "fields not used", ", ".join(f"{name} ({n:,} rows)" for name, n in check.unread.items())
    for line in check.facts:
        yield "template", line
