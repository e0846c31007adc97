"""`talik check` finds planted problems at their lines, and nothing in clean rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from talik.check.checker import Check, check_rows
from talik.check.text import check_page, check_text
from talik.cli import main
from talik.data.reading import read_rows
from talik.recipe import check as recipe_of

WORDS = [
    "river",
    "mountain",
    "engine",
    "garden",
    "letter",
    "window",
    "bridge",
    "winter",
    "summer",
    "market",
    "teacher",
    "doctor",
    "history",
    "science",
    "music",
    "paper",
    "silver",
    "forest",
    "island",
    "harbour",
    "kitchen",
    "village",
    "station",
    "journey",
    "weather",
    "morning",
    "evening",
    "language",
    "number",
]
CHINESE = "天地山水风火花鸟鱼书画琴棋茶酒诗词歌舞春夏秋冬东西南北"


def clean_rows(count: int) -> list[dict[str, Any]]:
    """Conversations as people write them: English, Chinese, code, with one or two answers."""
    dice = random.Random(11)

    def text(low: int, high: int) -> str:
        if dice.random() < 0.2:
            return "".join(dice.choices(CHINESE, k=dice.randint(low * 3, high * 3))) + "。"
        if dice.random() < 0.1:
            name = dice.choice(WORDS)
            number = dice.randint(0, 10**6)
            return f"def {name}(x):\n    return x + {number}  # {dice.choice(WORDS)} <b and a> & co."
        return " ".join(dice.choices(WORDS, k=dice.randint(low, high))).capitalize() + "."

    rows = []
    for number in range(count):
        turns = []
        for _ in range(dice.choice([1, 1, 1, 2])):
            turns.append({"role": "user", "content": f"{text(4, 12)} ({number})"})
            turns.append({"role": "assistant", "content": f"{text(5, 25)} {dice.random():.6f}"})
        rows.append({"id": number, "messages": turns})
    return rows


def turns(*texts: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def of(**fields: Any) -> dict[str, Any]:
    return {**turns("What is that over there?", "It is a heron, I think."), **fields}


def ask(role: str, text: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


LONG = "The old harbour has a stone bridge and a market where fishermen sell what the sea has given them"
U, A = ask("user", "A new question here?"), ask("assistant", "An answer to it.")
# Each planted row (or raw line), and the kind that names it. {row} is put where a clean row stood.
PLANTED: list[tuple[Any, str]] = [
    ('{"messages": [', "broken JSON"),
    ('{"id": 1, "id": 2, "messages": []}', "broken JSON"),
    ('{"messages": NaN}', "broken JSON"),
    ('["a", "b"]', "not an object"),
    ("5", "not an object"),
    ({"messages": []}, "wrong type"),
    ({"messages": "text"}, "wrong type"),
    ({"id": 4}, "missing field"),
    ({"input": "q", "output": "a"}, "another format"),
    (turns("Who is this?", ""), "empty field"),
    (turns("Who is that one?", None), "wrong type"),
    (turns("Who was it then?", 5), "wrong type"),
    (turns("   ", "An answer."), "empty field"),
    (turns("Only a question?"), "no answer"),
    ({"messages": [A, U, A]}, "starts with the assistant"),
    ({"messages": [U, A, U]}, "ends with the user"),
    ({"messages": [U, U, A]}, "two turns of one role"),
    ({"messages": [U, A, A]}, "two turns of one role"),
    ({"messages": [U, ask("system", "s"), A]}, "system message not first"),
    ({"messages": [U, ask("tool", "5"), A]}, "tool result without a call"),
    ({"messages": [ask("narrator", "x"), A]}, "unknown role"),
    ({"messages": [{"role": "user"}, A]}, "missing field"),
    ({"messages": [U, ask("assistant", "x", weight=0.3)]}, "wrong weight"),
    ({"messages": [U, ask("assistant", "x", weight=0)]}, "nothing to train"),
    ({"messages": [U, ask("assistant", "x", refusal="no")]}, "unknown field of a message"),
    ({"messages": [U, ask("assistant", "", tool_calls=[{"name": "f", "arguments": "{"}])]}, "broken JSON"),
    (of(images=["a.png"]), "media"),
    ({"messages": [ask("user", [{"type": "image_url", "image_url": "u"}]), A]}, "media"),
    (of(chosen="a", rejected="b"), "preferences"),
    (of(label=False), "preferences"),
    (of(sytem="Be kind."), "misspelt field"),
    (turns("What ends it?", "This <|im_end|> does."), "control token"),
    (turns("Half of it?", "half \ud83d"), "broken character"),
    (turns("Where is the cafÃ© here?", "In the street."), "wrong encoding"),
    (turns("Where is the caf\ufffd now?", "Still in the street."), "replacement character"),
    (turns("A nul\0 in it?", "Yes, there is."), "NUL character"),
    (turns("Is that turned \u202eround?", "Yes, it is."), "text direction"),
    (turns("What is missing here?", "TODO"), "placeholder"),
    (
        turns("Is this question the answer, too?", "Is this question the answer, too?"),
        "answer repeats the question",
    ),
    (turns("A long one?", "word " * 3000), "too long: answer cut"),
    (("same", 7), "duplicate"),
    (
        [turns("Tell me of the harbour.", f"{LONG}."), turns("Tell me of the harbour.", f"{LONG}!")],
        "near duplicate",
    ),
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[int, str]]:
    """A clean file, one with planted problems, and the lines of these."""
    folder = tmp_path_factory.mktemp("check")
    lines = [json.dumps(row, ensure_ascii=False) for row in clean_rows(2000)]
    (folder / "clean.jsonl").write_text("\n".join(lines), encoding="utf-8")
    where: dict[int, str] = {}
    at = 100
    for row, kind in PLANTED:
        at += 40
        if isinstance(row, tuple):
            lines[at] = lines[row[1]]
        elif isinstance(row, list):
            lines[at - 1], lines[at] = (json.dumps(one) for one in row)
        else:
            lines[at] = row if isinstance(row, str) else json.dumps(row)
        where[at + 1] = kind
    (folder / "planted.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "clean.jsonl", folder / "planted.jsonl", where


@pytest.fixture
def checked(tokenizer: Any) -> Callable[..., Check]:
    def run(path: Path, **options: Any) -> Check:
        return check_rows(recipe_of({"model": "-", "data": str(path), **options}), tokenizer)

    return run


def test_each_of_more_than_40_planted_problems_is_found_at_its_line(planted: Any, checked: Any) -> None:
    _, path, where = planted
    assert len(where) >= 40
    found: dict[int, set[str]] = {}
    for finding in checked(path).findings:
        if finding.severity == "problem":
            found.setdefault(finding.line, set()).add(finding.kind)
    assert {line: kind for line, kind in where.items() if kind not in found.get(line, ())} == {}
    assert set(found) == set(where), "and nothing else is"


def test_a_clean_file_has_no_problem(planted: Any, checked: Any) -> None:
    check = checked(planted[0])
    assert check.problems == 0 and check.rows == 2000, check.findings[:5]
    numbers = check.as_dict()
    assert numbers["examples"] == 2000 and numbers["fields_not_used"] == {"id": 2000}
    assert {"Latin", "Han"} <= set(numbers["scripts"]) and numbers["bytes_per_token"]["Latin"] > 0


def test_a_question_in_training_and_evaluation_is_found(checked: Any, tmp_path: Path) -> None:
    for name, rows in (("a", ["Who sings?", "Who runs?"]), ("b", ["Who  SINGS?", "Who swims?"])):
        lines = [json.dumps({"input": q, "output": f"{q} {name} does it."}) for q in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    check = checked(tmp_path / "a.jsonl", eval_data=str(tmp_path / "b.jsonl"))
    leaks = [f for f in check.findings if f.kind == "in training and evaluation"]
    assert [(Path(f.file).name, f.line) for f in leaks] == [("b.jsonl", 1)] and "a.jsonl:1" in leaks[0].text


def test_the_command(
    planted: Any, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, broken, where = planted
    assert main(["check", str(clean), "--model", str(model_folder), "--max-length", "20000"]) == 0
    assert "no problem" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["check", str(broken), "--model", str(model_folder), "--json", "--html", str(page)]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["problems"] >= len(where) and {f["line"] for f in value["findings"]} >= set(where)
    assert "http" not in page.read_text().split("<h1>")[0].replace("http-equiv", "")
    assert main(["check", "nothing.jsonl", "--model", str(model_folder)]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_the_page_escapes_what_rows_hold(checked: Any, tokenizer: Any, tmp_path: Path) -> None:
    row = {"input": "<script>alert(1)</script>", "output": "<img src=x onerror=alert(2)>\ufffd"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    check = checked(tmp_path / "x.jsonl")
    page = check_page(check, "<script>", tokenizer)
    assert "<script>" not in page and "<img" not in page and "replacement character" in page
    assert "x.jsonl:1" in check_text(check)


def test_convert_writes_rows_of_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\nq1,a1\nq2,\nq3,a3\n")
    out = tmp_path / "out.jsonl"
    assert main(["convert", str(rows), str(out)]) == 2 and not out.exists()
    assert "rows.csv:3: field 'answer' is empty" in capsys.readouterr().err
    assert main(["convert", str(rows), str(out), "--bad-rows", "skip"]) == 0
    assert "2 rows; 1 rows cannot be used" in capsys.readouterr().out
    assert [row.fields for row in read_rows(out)] == [turns("q1", "a1"), turns("q3", "a3")]
    assert (
        main(["convert", str(out), str(out)]) == 2
        and "one of the files that are read" in capsys.readouterr().err
    )
