"""`talik chat`: a conversation with a run or a model."""

from __future__ import annotations

from talik.base.errors import UsageError
from talik.cli.options import (
    arg,
    options,
    parse,
    positional,
    quiet,
)
from talik.cli.show import console

DATE = "for a chat template that writes today's: a date as 2026-01-31, or `run` for that of the training"


def command(argv: list[str]) -> None:
    wanted = options(
        "Chat",
        ("target", positional(str, "folder of a run, or a model", "RUN|MODEL")),
        ("prompt", arg(str | None, "ask this one question and end"), None),
        ("system", arg(str | None, "a system message"), None),
        ("base", arg(bool, "of a run: talk to the model as it was before"), False),
        ("max_tokens", arg(int, "longest answer"), 256),
        ("temperature", arg(float, "0: always the likeliest token"), 0.0),
        ("date", arg(str | None, DATE), None),
    )
    parsed = parse("chat", wanted, argv, "Talks to a run or a model. An empty line or Ctrl-D ends it.")
    from talik.chat import Talk, chat_date, load_for_chat
    from talik.cli.show.watch import Watch

    if parsed.max_tokens < 1 or parsed.temperature < 0:
        raise UsageError("--max-tokens must be at least 1, and --temperature at least 0")
    date = chat_date(parsed.target, parsed.date)

    quiet()
    with Watch() as watch:
        model, tokenizer = load_for_chat(parsed.target, base=parsed.base, date=date, notify=watch)
    system = [{"role": "system", "content": parsed.system}] if parsed.system else []
    talk = Talk(model, tokenizer, system, parsed.max_tokens, parsed.temperature)
    for question in [parsed.prompt] if parsed.prompt is not None else console.questions():
        for text in talk.ask(question):
            console.piece(text)
        console.piece("\n")
