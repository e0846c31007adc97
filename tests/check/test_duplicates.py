"""Rows that repeat others are found; exercises, labels and questions about one text are not."""

from __future__ import annotations

from collections.abc import Sequence

from helpers.made_rows import LONG, OTHER, SHARED, Writer
from talik.check.duplicates import Duplicates
from talik.check.encodings import misread
from talik.data.messages import Conversation, Document, Message
from talik.data.reading.rows import Place

Made = Conversation | Document


def asked(line: int, question: str, answer: str, file: str = "a", system: str = "") -> Conversation:
    messages = [Message("user", question), Message("assistant", answer)]
    first = [Message("system", system)] if system else []
    return Conversation((*first, *messages), Place(file, line))


def found(
    rows: Sequence[Made], others: Sequence[Made] = (), share: float = 0
) -> list[tuple[str, str, int, str]]:
    """Severity, kind and line of all findings, and the other place in each."""
    seen = Duplicates(held_out=share)
    seen.learn(rows)
    for row in rows:
        seen.add(row)
    for row in others:
        seen.add(row, evaluation=True)
    return [(r.severity, r.kind, r.place.line, r.text.rpartition(" ")[2]) for r in seen.repeats()]


def pairs(*texts: tuple[str, str]) -> list[Made]:
    return [asked(line, *pair) for line, pair in enumerate(texts, start=1)]


def test_the_first_of_equal_rows_is_named_by_all_others() -> None:
    rows = pairs(("Why?", "So."), ("How?", "Thus."), ("Why?", "So."), ("Why?", "So."))
    assert found(rows) == [("problem", "duplicate", 3, "a:1"), ("problem", "duplicate", 4, "a:1")]


def test_rows_that_differ_in_what_the_template_writes_are_not_equal() -> None:
    assert (
        found([asked(1, "Why?", "So.", system="Be kind."), asked(2, "Why?", "So.", system="Be rude.")]) == []
    )


def test_case_and_punctuation_make_no_other_row_but_signs_and_numbers_do() -> None:
    assert found(pairs((LONG, "It has."), (LONG.upper() + "?", "it has"))) == [
        ("problem", "near duplicate", 2, "a:1")
    ]
    signs = found(pairs((f"{LONG} C++", "It has."), (f"{LONG} C#", "It has.")))
    assert {severity for severity, *_ in signs} <= {"note"}
    assert found(pairs((f"{LONG} 3.5", "It has."), (f"{LONG} 35", "It has."))) == []


def test_a_word_in_twenty_makes_a_near_duplicate() -> None:
    rows = pairs((f"What of it? {OTHER}", LONG), (f"What of it? {OTHER}", LONG.replace("stone", "wooden")))
    assert ("problem", "near duplicate", 2, "a:1") in found(rows)
    chinese = "山下有一条小河，河边的人家每天早晨在石桥上卖鱼和青菜，孩子们在树下读书写字。"
    assert found(pairs(("讲一讲。", chinese), ("讲一讲。", chinese.replace("石桥", "木桥"))))[-1][:3] == (
        ("problem", "near duplicate", 2)
    )


def test_exercises_that_differ_in_their_numbers_are_no_duplicates() -> None:
    question = f"{LONG}. {OTHER}. A farmer has {{}} sheep and sells some of them. How many are left?"
    answer = f"{OTHER}. {LONG}. The farmer keeps {{}} sheep, because the others were sold."
    assert found(pairs(*((question.format(n), answer.format(n + 3)) for n in range(50, 56)))) == []


def test_a_prompt_that_all_rows_share_makes_no_duplicates() -> None:
    writer = Writer(3)
    rows = pairs(*((SHARED + writer.english(1), "positive") for _ in range(300)))
    assert found(rows) == []
    rows[200] = asked(
        201, SHARED + "Zinc lamps hum while eleven brave otters juggle plums over Dover", "negative"
    )
    rows[250] = asked(
        251, SHARED + "Zinc lamps hum while eleven brave otters juggle plums over Dover!", "negative"
    )
    assert found(rows) == [("problem", "near duplicate", 251, "a:201")]


def test_questions_about_one_text_are_no_duplicates() -> None:
    text = Writer(5).english(8)
    assert found(pairs((f"{text} Who sings?", "The bird."), (f"{text} Who swims?", "The fish."))) == []
    same = found(pairs((f"{text} Who sings?", "Nobody."), (f"{text} Who swims?", "Nobody.")))
    assert {severity for severity, *_ in same} == {"note"}


def test_a_question_with_other_answers_is_a_note() -> None:
    assert found(pairs(("Why?", "So."), ("Why?", "Because."))) == [("note", "another answer", 2, "a:1")]


def test_an_answer_to_many_questions_is_a_note() -> None:
    rows = pairs(
        *((f"Question number {n} about it?", "The service is not available now.") for n in range(12))
    )
    assert [(s, k, line) for s, k, line, _ in found(rows)] == [("note", "one answer to many questions", 1)]
    assert found(pairs(*((f"Is number {n} a good one?", "yes") for n in range(12)))) == []


def test_questions_that_are_trained_and_evaluated_are_problems() -> None:
    rows = pairs(("Who sings?", "The bird."), ("Who runs?", "The dog."), (f"{LONG}?", OTHER))
    others = [
        asked(1, "who SINGS", "A man.", "b"),
        asked(2, "Who swims?", "The fish.", "b"),
        asked(3, LONG.replace("stone", "wooden"), OTHER, "b"),
        asked(4, LONG.replace("bridge", "wall"), "It does not say so.", "b"),
    ]
    assert found(rows, others) == [
        ("problem", "in training and evaluation", 1, "a:1"),
        ("problem", "in training and evaluation", 3, "a:3"),
        ("note", "in training and evaluation", 4, "a:3"),
    ]


def test_documents_are_compared_too() -> None:
    documents: list[Made] = [
        *(Document(text, Place("a", line)) for line, text in enumerate((LONG, OTHER, LONG), start=1)),
        Document(OTHER.replace("ladder", "rope"), Place("a", 4)),
    ]
    assert found(documents) == [("problem", "duplicate", 3, "a:1"), ("problem", "near duplicate", 4, "a:2")]
    assert found(documents[:2], [Document(LONG, Place("b", 1))]) == [
        ("problem", "in training and evaluation", 1, "a:1")
    ]


def test_equal_questions_stay_on_one_side_of_the_held_out_part_and_alike_ones_may_not() -> None:
    writer = Writer(9)
    texts = [writer.english(2) for _ in range(40)]
    rows = pairs(*((text, f"Answer {n}.") for n, text in enumerate(texts * 2)))
    assert {kind for _, kind, *_ in found(rows, share=0.5)} == {"another answer"}
    alike = pairs(*((text, "Yes.") for text in texts), *((f"{text}!", "No.") for text in texts))
    leaks = [one for one in found(alike, share=0.5) if one[1] == "in training and held-out"]
    assert 5 < len(leaks) < 35 and {severity for severity, *_ in leaks} == {"problem"}


def test_sound_text_in_any_language_is_not_misread() -> None:
    sound = (
        *(
            "„Spaß“ und „Öl“, MENÜ” – Ä“",
            "MANHÃ” É” NÃO",
            "¿Qué…” ó”",
            "déjà… » à »",
            "СССР РСФСР",
            "Å, Ä och Ö",
        ),
        *("山下有一条小河河边的人家每天早晨", "naïve façade 20 °C £5 §3", "½ × 3 ≠ ⅔ “quoted” — dash…"),
    )
    assert [text for text in sound if misread(text)] == []


def test_text_in_a_wrong_encoding_is_found_in_whatever_way_it_was_misread() -> None:
    meant = {
        "cp1252": ("café au lait", "Müller", "it’s", "naïve — oui", "ＡＢ测试"),
        "cp1251": ("Привет всем", "Что это"),
        "gbk": ("你好世界这是一个测试",),
    }
    for encoding, texts in meant.items():
        for text in texts:
            wrong = text.encode("utf-8").decode(encoding, errors="replace")
            assert misread(wrong) or "\ufffd" in wrong, (encoding, text, wrong)
