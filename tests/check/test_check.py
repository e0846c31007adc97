"""`talik check` finds planted problems at their lines, and nothing in clean rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.made_rows import NOTES, PLANTED, clean_rows, turns
from talik.check.checker import check_rows
from talik.check.report_html import check_page
from talik.check.report_text import check_text
from talik.check.result import LISTED, Check
from talik.cli.main import main
from talik.recipe.recipe import checked_recipe as recipe_of

Checked = Callable[..., Check]


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[int, tuple[str, str]]]:
    """A clean file, one with planted rows, and the severity and kind by line of these."""
    folder = tmp_path_factory.mktemp("check")
    rows: list[Any] = list(clean_rows(2000))
    clean = write(folder / "clean.jsonl", rows)
    where: dict[int, tuple[str, str]] = {}
    every = [(row, ("problem", kind)) for row, kind in PLANTED]
    every += [(row, ("note", kind)) for row, kind in NOTES]
    for at, (row, kind) in enumerate(every):
        at = 100 + 30 * at
        if isinstance(row, int):
            rows[at] = rows[row]
        elif isinstance(row, list):
            rows[at - 1], rows[at] = row
        else:
            rows[at] = row
        where[at + 1] = kind
    return clean, write(folder / "planted.jsonl", rows), where


@pytest.fixture
def checked(tokenizer: Any) -> Checked:
    def run(path: Path, **options: Any) -> Check:
        return check_rows(
            recipe_of({"model": "-", "data": str(path), "max_length": 20000, **options}), tokenizer
        )

    return run


def found_in(check: Check, severity: str) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for finding in check.findings:
        if finding.severity == severity:
            found.setdefault(finding.line, set()).add(finding.kind)
    return found


def test_each_planted_problem_is_found_at_its_line_and_nothing_else_is(
    planted: Any, checked: Checked
) -> None:
    _, path, where = planted
    assert sum(severity == "problem" for severity, _ in where.values()) >= 40
    check = checked(path)
    for severity in ("problem", "note"):
        found = found_in(check, severity)
        wanted = {line: kind for line, (of, kind) in where.items() if of == severity}
        assert {line: kind for line, kind in wanted.items() if kind not in found.get(line, ())} == {}
    assert set(found_in(check, "problem")) == {line for line, (of, _) in where.items() if of == "problem"}


def test_a_clean_file_has_no_problem(planted: Any, checked: Checked) -> None:
    check = checked(planted[0])
    assert check.problems == 0 and check.rows == 2000, check.findings[:5]
    kinds = {group.kind for group in check.groups()}
    assert kinds <= {"HTML entity", "HTML tag", "escaped line break"}, "notes about code alone"
    numbers = check.as_dict()
    assert numbers["examples"] == 2000 and numbers["fields_not_used"] == {"id": 2000}
    assert {"Latin", "Han", "Cyrillic"} <= set(numbers["scripts"])
    assert (
        numbers["tokenizer"]["Han"]["single_byte_share"]
        > 0.5
        > numbers["tokenizer"]["Latin"]["single_byte_share"]
    )


def test_kinds_do_not_hide_each_other(checked: Checked, tmp_path: Path) -> None:
    rows: list[Any] = [turns(f"Question {n}?", f"TODO{'!' * (n % 7)}") for n in range(LISTED + 5)]
    check = checked(write(tmp_path / "x.jsonl", [*rows, turns("A nul?", "Yes\0.")]))
    counts = {group.kind: (group.count, len(group.findings)) for group in check.groups()}
    assert counts["placeholder"] == (LISTED + 5, LISTED) and counts["NUL character"] == (1, 1)
    assert check.as_dict()["findings_left_out"] == 5


def test_rows_over_the_greatest_length_count_in_the_numbers(checked: Checked, tmp_path: Path) -> None:
    rows = [turns("Count.", " ".join(map(str, range(n)))) for n in (10, 400)]
    check = checked(write(tmp_path / "x.jsonl", rows), max_length=512)
    numbers = check.as_dict()
    assert numbers["examples"] == 2 and numbers["at_max_length"][512] == {"answer cut": 1}
    assert found_in(check, "problem") == {2: {"too long"}}


def test_the_limit_of_a_source_counts_over_its_files(tokenizer: Any, tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [turns(f"{name} {n}?", f"Answer {n}.") for n in range(10)])
    recipe = recipe_of({"model": "-", "data": [{"path": str(tmp_path), "limit": 12}]})
    assert check_rows(recipe, tokenizer).rows == 12


def test_control_tokens_that_are_meant_are_a_note(checked: Checked, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [turns("What ends a turn?", "<|im_end|> does, or [/INST].")])
    assert checked(path).problems == 2
    check = checked(path, control_tokens="escape")
    assert check.problems == 0 and {g.kind for g in check.groups()} == {
        "control token",
        "marks of another template",
    }


def test_tools_that_the_template_drops_are_a_problem_though_the_answer_names_them(
    checked: Checked, tmp_path: Path
) -> None:
    tools = [{"type": "function", "function": {"name": "snow_depth", "parameters": {"type": "object"}}}]
    row = {**turns("Snow in Zell?", '{"name": "snow_depth"}'), "tools": tools}
    check = checked(write(tmp_path / "x.jsonl", [row]))
    assert [(f.kind, f.field) for f in check.findings] == [("not written by the chat template", "tools")]


def test_many_missing_values_are_meant(checked: Checked, tmp_path: Path) -> None:
    rows = [turns(f"The value of {n}?", "N/A" if n % 3 else str(n)) for n in range(90)]
    check = checked(write(tmp_path / "x.jsonl", rows))
    assert check.problems == 0 and [(g.severity, g.kind, g.count) for g in check.groups()] == [
        ("note", "missing value", 60)
    ]


def test_a_file_that_ends_early_is_a_problem_and_the_others_are_checked(
    checked: Checked, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text('[{"input": "q", "output": "a"}, {"input": ')
    write(tmp_path / "b.jsonl", [{"input": "q?", "output": "TODO"}])
    check = checked(tmp_path)
    assert {(Path(f.file).name, f.kind) for f in check.findings} >= {("b.jsonl", "placeholder")}
    assert any(Path(f.file).name == "a.json" and f.severity == "problem" for f in check.findings)


def run(*arguments: Any) -> int:
    return main(["check", *map(str, arguments)])


def test_the_command_exits_with_1_where_there_are_problems(
    planted: Any, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, broken, _ = planted
    options = ("--model", model_folder, "--max-length", 20000, "--no-plan")
    assert run(clean, *options) == 0 and "no problem" in capsys.readouterr().out
    assert run(broken, *options) == 1
    text = capsys.readouterr().out
    assert f"{broken}:101: " in text and "-> Write one complete object on each line." in text
    assert text.index("problem: ") < text.index("note: ")
    assert run("nothing.jsonl", *options) == 2 and "there is no such file" in capsys.readouterr().err


def test_json_has_every_finding_with_its_place(
    planted: Any, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(planted[1], "--model", model_folder, "--json", "--no-plan", "--max-length", 20000) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["problems"] == sum(value["counts"]["problem"].values())
    assert {f["line"] for f in value["findings"]} >= set(planted[2])
    fields = {"file", "line", "unit", "field", "kind", "severity", "text", "remedy"}
    assert all(set(finding) == fields and finding["remedy"] for finding in value["findings"])
    keys = {"rows", "notes", "findings_left_out", "template", "plan", "lengths", "at_max_length", "roles"}
    assert keys - {"lengths"} <= set(value)


def test_a_plan_is_part_of_the_result(
    rows: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(rows, "--model", model_folder, "--json") == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert "the top 4 layers" in plan[0] and plan[1].startswith("fits") and "time" in " ".join(plan)


def test_the_page_needs_no_network_and_escapes_what_rows_hold(
    checked: Checked, tokenizer: Any, tmp_path: Path
) -> None:
    row = {"input": "<script>alert(1)</script>", "output": "<img src=x onerror=alert(2)>\ufffd", "<u>": 1}
    check = checked(write(tmp_path / "<b>x.jsonl", [row]))
    page = check_page(check, "<script>'\"", tokenizer)
    assert not re.search(r"<(script|img|b>|u>|link|iframe)", page) and "replacement character" in page
    assert not re.search(r"(src|href)\s*=\s*['\"]|url\(|@import|https?:", page.replace("src=x", ""))
    assert "prefers-color-scheme: dark" in page and "max-width: 640px" in page
    assert "x.jsonl:1" in check_text(check)


def test_the_page_is_written_where_it_is_asked_for(rows: Path, model_folder: Path, tmp_path: Path) -> None:
    assert run(rows, "--model", model_folder, "--no-plan", "--html", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "30 rows: no problem" in page and page.count("class='bar'") > 3 and "<h3>" in page
