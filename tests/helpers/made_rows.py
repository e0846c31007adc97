"""A clean data set as people have them, and rows with one problem each."""

from __future__ import annotations

import random
from typing import Any

NOUNS = [
    "river",
    "mountain",
    "engine",
    "garden",
    "letter",
    "window",
    "bridge",
    "winter",
    "market",
    "teacher",
    "doctor",
    "history",
    "paper",
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
    "ship",
    "road",
    "tower",
    "lamp",
    "field",
    "horse",
    "wheel",
    "cloud",
    "stone",
    "table",
    "clock",
    "song",
    "coat",
    "glass",
    "rope",
    "flour",
    "seed",
    "nail",
    "barrel",
    "anchor",
]
VERBS = [
    "keeps",
    "moves",
    "holds",
    "turns",
    "finds",
    "leaves",
    "carries",
    "builds",
    "paints",
    "repairs",
    "watches",
    "measures",
    "opens",
]
ADJECTIVES = [
    "old",
    "small",
    "quiet",
    "broken",
    "heavy",
    "bright",
    "narrow",
    "cold",
    "wooden",
    "early",
    "hollow",
    "steep",
    "gentle",
    "crowded",
]
GERMAN = [
    "Fluss",
    "Wald",
    "Brücke",
    "Straße",
    "Gespräch",
    "Müller",
    "Äpfel",
    "Öl",
    "Übung",
    "Größe",
    "Haus",
    "Schiff",
    "Lampe",
    "Menü",
    "Spaß",
]
CHINESE = "天地山水风火花鸟鱼书画琴棋茶酒诗词歌舞春夏秋冬东西南北学问家国人心道德行走看听说写读想做"
RUSSIAN = [
    "река",
    "гора",
    "сад",
    "письмо",
    "окно",
    "мост",
    "зима",
    "рынок",
    "врач",
    "школа",
    "бумага",
    "лес",
    "остров",
    "кухня",
    "вокзал",
]
SHARED = (
    "You are an expert annotator. Read the following review of a product and decide whether its sentiment is "
    "positive, negative or neutral. Answer with one word only and do not explain it, because a program reads "
    "the answer that cannot understand explanations.\n\nReview: "
)


class Writer:
    """Writes clean rows; the same seed writes the same ones."""

    def __init__(self, seed: int = 11) -> None:
        self.dice = random.Random(seed)

    def english(self, sentences: int) -> str:
        pick = self.dice.choice
        return " ".join(
            f"The {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} the {pick(NOUNS)} near a {pick(ADJECTIVES)} "
            f"{pick(NOUNS)}, and nobody {pick(VERBS)} its {pick(NOUNS)}."
            for _ in range(sentences)
        )

    def prose(self, number: int) -> tuple[str, str]:
        return f"What do you know of the {self.dice.choice(NOUNS)} in story {number}?", self.english(3)

    def chinese(self, number: int) -> tuple[str, str]:
        text = ["".join(self.dice.choices(CHINESE, k=self.dice.randint(8, 16))) for _ in range(4)]
        return f"请问{text[0]}（第{number}题）？", f"{text[1]}，{text[2]}。{text[3]}！"

    def german(self, number: int) -> tuple[str, str]:
        words = self.dice.choices(GERMAN, k=9)
        return f"Was heißt „{words[0]}“ in Satz {number}?", f"„{' '.join(words)}“ – so heißt es, für ½ €."

    def russian(self, number: int) -> tuple[str, str]:
        return f"Что такое {self.dice.choice(RUSSIAN)} № {number}?", " ".join(self.dice.choices(RUSSIAN, k=9))

    def sums(self, number: int) -> tuple[str, str]:
        a, b = self.dice.randint(10, 99999), self.dice.randint(10, 999)
        return f"What is {a} * {b} - {number}?", str(a * b - number)

    def algebra(self, number: int) -> tuple[str, str]:
        a, b = self.dice.randint(2, 99), self.dice.randint(2, 99)
        question = f"Solve for x: ${a}x + {number} = {a * b + number}$. Show all the steps of your work."
        steps = f"Subtract {number} from both sides: ${a}x = {a * b}$. Divide by {a}: "
        end = f"so \\boxed{{{b}}}. Hence $x \\neq 0$ and \\nabla f is not needed."
        return question, f"{steps}$x = \\frac{{{a * b}}}{{{a}}} = {b}$, {end}"

    def code(self, number: int) -> tuple[str, str]:
        name = f"{self.dice.choice(VERBS)}_{self.dice.choice(NOUNS)}_{number}"
        body = (
            f"    return '\\n'.join(f\"{{x}} & {number}\" for x in xs if x < {number})  # &lt; in <b>HTML</b>"
        )
        return f"Write the function `{name}`.", f"```python\ndef {name}(xs):\n{body}\n```"

    def labels(self, number: int) -> tuple[str, str]:
        return f"{SHARED}{self.english(1)}", self.dice.choice(["positive", "negative", "neutral"])

    def reading(self, number: int) -> tuple[str, str]:
        """Two questions about each text."""
        text = Writer(number // 20).english(6)
        kind = ("first thing", "last place")[number // 10 % 2]
        return f"{text}\n\nWhich is the {kind} that this text names? ({number})", self.dice.choice(NOUNS)

    def row(self, number: int) -> dict[str, Any]:
        kinds = (
            *(self.prose, self.chinese, self.german, self.russian, self.sums, self.algebra, self.code),
            *(self.labels, self.reading, self.prose),
        )
        pairs = [kinds[number % len(kinds)](number)]
        if number % 7 == 0:
            pairs.append((f"And what else is there to say of number {number}?", self.english(2)))
        system = [{"role": "system", "content": "You are helpful and brief."}] if number % 3 == 0 else []
        messages = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return {"id": number, "messages": system + messages}


def clean_rows(count: int) -> list[dict[str, Any]]:
    """Conversations in English, Chinese, German, Russian, of sums, algebra, code, labels and reading."""
    writer = Writer()
    return [writer.row(number) for number in range(count)]


def turns(*texts: Any) -> dict[str, Any]:
    """A row of messages, the user's first."""
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def ask(role: str, text: Any, **more: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": text, **more}


def _of(**fields: Any) -> dict[str, Any]:
    return {**turns("What is that over there?", "It is a heron, I think."), **fields}


BROKEN_CALL = {"name": "f", "arguments": "{"}
LONG = "The old harbour has a stone bridge and a market where fishermen sell what the sea has given them"
OTHER = "Every evening the lamps along the narrow road are lit by a boy who carries a ladder and a can of oil"
U, A = ask("user", "A new question here?"), ask("assistant", "An answer to it.")
# Each planted row (or raw line), and the kind that names it. A number is the clean row to repeat; the last
# row of a list is the planted one.
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
    ({"messages": [U, ask("assistant", "", tool_calls=[BROKEN_CALL])]}, "broken JSON"),
    (_of(images=["a.png"]), "media"),
    ({"messages": [ask("user", [{"type": "image_url", "image_url": "u"}]), A]}, "media"),
    (_of(chosen="a", rejected="b"), "preferences"),
    (_of(label=False), "preferences"),
    (_of(sytem="Be kind."), "misspelt field"),
    (turns("What ends it?", "This <|im_end|> does."), "control token"),
    (turns("Whose mark is it?", "It is a mark. [/INST] Or is it?"), "marks of another template"),
    (turns("Half of it?", "half \ud83d"), "broken character"),
    (turns("Where is the cafÃ© here?", "In the street."), "wrong encoding"),
    (turns("It isnâ€™t far, is it?", "No, a mile."), "wrong encoding"),
    (turns("Какое это слово?", "РџСЂРёРІРµС‚"), "wrong encoding"),
    (turns("这是什么？", "这是锟斤拷。"), "wrong encoding"),
    (turns("Where is the caf\ufffd now?", "Still in the street."), "replacement character"),
    (turns("A nul\0 in it?", "Yes, there is."), "NUL character"),
    (turns("Does it ring?", "It rings\x07 twice."), "control character"),
    (turns("Is that turned \u202eround?", "Yes, it is."), "text direction"),
    (turns("Is it sec\u200bret?", "Nobody sees it."), "zero-width character"),
    (turns("Who sells it?", "Smith &amp; Sons, in the &quot;Old Street&quot;"), "HTML entity"),
    (turns("What are the steps?", "First open it.\\nThen close it.\\nThen leave"), "escaped line break"),
    (turns("What is missing here?", "TODO"), "placeholder"),
    (turns("What is the value of it?", "N/A"), "missing value"),
    (turns("What is in the picture?", "<image> is a heron."), "media placeholder"),
    (turns("Is this question the answer?", "Is this question the answer?"), "answer repeats the question"),
    (turns("A long one?", " ".join(str(n * n) for n in range(9000))), "too long"),
    (7, "duplicate"),
    (11, "duplicate"),
    (
        [turns("Tell me of the harbour.", f"{LONG}."), turns("tell me of the harbour", f"{LONG}!")],
        "near duplicate",
    ),
    (
        [
            turns("How is the road lit?", OTHER),
            turns("How is the road lit?", OTHER.replace("ladder", "rope")),
        ],
        "near duplicate",
    ),
]
NOTES: list[tuple[Any, str]] = [
    (turns("Who are you at all?", "As an AI language model, I cannot say."), "refusal"),
    (turns("Where can I read more?", "https://example.org/more"), "answer is only a link"),
    (
        turns("Write a letter to somebody.", "Dear {first_name}, I hope that you are well."),
        "unfilled template",
    ),
    (turns("Why does it not stop?", "and so it goes on " * 40), "repeats itself"),
    (turns("How does one say harbour?", "これはみなとです"), "answer in another script"),
    (turns("Is that all there is?", "."), "answer is one sign"),
    ([turns("Who sings?", "The bird."), turns("Who sings?", "A man, I think.")], "another answer"),
]
