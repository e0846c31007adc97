"""Renders the result of `talik check` as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from talik.check.report_text import cuts, known_in_words, numbers, summary
from talik.check.result import Check, Group
from talik.data.preview import length_ranges, sections
from talik.data.reading.rows import visible

LISTED = 200  # findings of each kind on the page
STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; --good: #1a7f37; --bad: #b3261e;
  --ink: #1f2328; --dim: #59636e; --page: #ffffff; --bar: #54779c; }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --soft: #161b22; --good: #3fb950;
  --bad: #ff7b72; --ink: #e6edf3; --dim: #9198a1; --page: #0d1117; --bar: #6b93bf; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; padding: 1rem; max-width: 72rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; } h3 { font-size: 1rem; overflow-wrap: anywhere; }
.summary { font-size: 1.15rem; border-left: .4rem solid var(--good); padding: .5rem .9rem;
  background: var(--soft); }
.summary.bad { border-color: var(--bad); }
details { border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; }
summary { cursor: pointer; padding: .5rem .8rem; background: var(--soft); font-weight: 600; }
.label { font-size: .8rem; text-transform: uppercase; letter-spacing: .04em; border: 1px solid currentColor;
  border-radius: 4px; padding: 0 .35rem; margin-right: .4rem; color: var(--dim); }
.problem .label { color: var(--bad); }
.count { color: var(--dim); font-weight: 400; }
.remedy { margin: .6rem .8rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .3rem .8rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; font-weight: 400; }
th { color: var(--dim); } .places td:first-child { width: 38%; font-family: ui-monospace, monospace;
  font-size: .87rem; }
.numbers th { width: 32%; }
.bars td { border: 0; padding: .1rem .5rem; white-space: nowrap; } .bars td:nth-child(2) { width: 75%; }
.bar { display: block; height: 1rem; background: var(--bar); border-radius: 2px; }
.right { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .8rem; font-size: .9rem; }
pre span { border: 1px solid var(--line); border-radius: 2px; }
.trained { border-bottom: 3px solid var(--good); font-weight: 600; } .masked { color: var(--dim); }
@media (max-width: 640px) {
  .places tr, .places td, .numbers tr, .numbers th, .numbers td { display: block; width: auto !important; }
  .places td + td, .numbers td { border: 0; padding-top: 0; }
  .bars td:nth-child(2) { width: 50%; }
}
"""


def check_page(check: Check, title: str, tokenizer: Any) -> str:
    """Renders the page: summary, findings by kind, statistics, and examples with their masks.

    Args:
        check: The result of the check.
        title: The names of the data.
        tokenizer: Decodes the tokens of the examples.
    """
    groups = "".join(_group(group) for group in check.groups()) or "<p>Nothing was found.</p>"
    state = "summary bad" if check.problems else "summary"
    body = [
        f"<h1>Check of {escape(visible(title))}</h1>",
        f"<p class='{state}'>{escape(summary(check))}</p>",
        f"<h2>Findings</h2>{groups}",
        f"<h2>Lengths in tokens</h2>{_bars(check)}{_rows('numbers', _cut_rows(check))}",
        f"<h2>Scripts</h2>{_scripts(check)}",
        f"<h2>Numbers</h2>{_rows('numbers', _other_numbers(check))}",
        "<h2>Examples</h2><p>Every box is one token. <span class='trained'>Bold and underlined</span> tokens "
        "are trained, <span class='masked'>the others</span> are masked. Hovering over a token shows its id. "
        "Long examples are shown up to their first 1,000 tokens.</p>",
        sections(check.examples, tokenizer).replace("<h2>", "<h3>").replace("</h2>", "</h3>"),
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Check of the data</title><style>{STYLE}</style></head>"
    )
    return "\n".join([head, "<body>", *body, "</body></html>\n"])


def _group(group: Group) -> str:
    """Renders the findings of one kind; problems are shown opened if there are at most 50."""
    rows = ((visible(one.place), visible(one.text)) for one in group.findings[:LISTED])
    remedies = " ".join(dict.fromkeys(one.remedy for one in group.findings[:3]))
    left = group.count - min(len(group.findings), LISTED)
    more = f"<p class='remedy'>and {left:,} more; --json lists up to 2,000 of a kind</p>" if left else ""
    is_open = " open" if group.severity == "problem" and group.count <= 50 else ""
    return (
        f"<details class='{group.severity}'{is_open}><summary><span class='label'>{group.severity}</span> "
        f"{escape(group.kind)} <span class='count'>({group.count:,})</span></summary>"
        f"<p class='remedy'>To do: {escape(remedies)}</p>{_rows('places', rows, 'td')}{more}</details>"
    )


def _rows(kind: str, rows: Iterable[tuple[str, str]], first: str = "th") -> str:
    cells = "".join(
        f"<tr><{first}>{escape(name)}</{first}><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f"<table class='{kind}'>{cells}</table>"


def _bars(check: Check) -> str:
    """Renders a histogram of the lengths."""
    ranges = length_ranges(check.statistics.lengths)
    most = max((count for _, _, count in ranges), default=1)
    rows = "".join(
        f"<tr><td class='right'>{low:,} to {high:,}</td>"
        f"<td><span class='bar' style='width:{100 * count / most:.1f}%'></span></td>"
        f"<td class='right'>{count:,}</td></tr>"
        for low, high, count in ranges
    )
    return f"<table class='bars'>{rows}</table>" if ranges else "<p>There are no examples.</p>"


def _cut_rows(check: Check) -> Iterable[tuple[str, str]]:
    return ((f"--max-length {length:,}", text) for length, text in cuts(check))


def _scripts(check: Check) -> str:
    """Renders a table of the scripts: their share of the letters, and how the tokenizer encodes them."""
    of = check.statistics.as_dict()
    return _rows(
        "numbers",
        (
            (
                name,
                f"{100 * share:.1f} % of the letters"
                + (f"; tokens: {known_in_words(of['tokenizer'][name])}" if name in of["tokenizer"] else ""),
            )
            for name, share in of["scripts"].items()
            if share >= 0.0005
        ),
    )


def _other_numbers(check: Check) -> Iterable[tuple[str, str]]:
    shown = ("at --max-length", "letters by script", "tokens of ")
    return ((name, value) for name, value in numbers(check) if not name.startswith(shown))
