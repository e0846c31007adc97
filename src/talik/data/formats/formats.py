"""Rows -> conversations and documents. A data format is one entry in `FORMATS`.

The format is recognised from the fields of the rows, in any letter case, and is the same for all rows of a
file. A row that does not hold what its format needs is an error with its place, never skipped in silence.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from talik.base.errors import DataError, UsageError
from talik.data.formats.converters import (
    Converted,
    document,
    instruction,
    of_messages,
    one_answer,
    prompt_completion,
    sharegpt,
    two_fields,
)
from talik.data.formats.fields import MISSING, Fields
from talik.data.formats.media import COLUMNS, check_media
from talik.data.formats.preferences import check_preferences
from talik.data.formats.tools import read_tools
from talik.data.formats.turn_rules import check_turns
from talik.data.messages import Conversation, Document, Message
from talik.data.reading.rows import Problem, Row, RowError, refuse


@dataclass(frozen=True, slots=True)
class Format:
    """A data format.

    Attributes:
        needs: The fields that a row must have.
        convert: Makes messages and tools of a row's fields, or the text of a document; raises RowError.
        reads: The fields that a row may have besides.
    """

    needs: tuple[str, ...]
    convert: Callable[[Fields], Converted]
    reads: tuple[str, ...] = ("system", "history", "tools")


@dataclass(frozen=True, slots=True)
class RowOptions:
    """How rows are read: the fields of a recipe of the same names."""

    input_field: str | None = None
    output_field: str | None = None
    format: str | None = None


def _two(asked: str, answered: str, answer: Callable[[Fields, str], str] = Fields.text) -> Format:
    return Format((asked, answered), two_fields(asked, answered, answer))


_OF_INSTRUCTION = ("input", "context", "system", "history", "tools")
_OF_LISTS = ("system", "tools", "functions")
# The first whose fields a row has is its format: 'instruction' rows have 'input' and 'output' too.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), of_messages, _OF_LISTS),
    "conversations": Format(("conversations",), sharegpt, _OF_LISTS),
    "instruction": Format(("instruction", "output"), instruction("output"), _OF_INSTRUCTION),
    "instruction-response": Format(("instruction", "response"), instruction("response"), _OF_INSTRUCTION),
    "prompt-completion": Format(("prompt", "completion"), prompt_completion),
    "prompt-response": _two("prompt", "response"),
    "query-response": _two("query", "response"),
    "question-answer": _two("question", "answer", one_answer),
    "question-response": _two("question", "response"),
    "input-output": _two("input", "output"),
    "input-target": _two("input", "target"),
    "user-assistant": _two("user", "assistant"),
    "text": Format(("text",), document, ()),
}
_KNOWN = {name for form in FORMATS.values() for name in (*form.needs, *form.reads)} | {"chosen", "rejected"}


@dataclass(slots=True)
class Converter:
    """Converts the rows of one file, and counts the fields that its format does not read.

    Attributes:
        name: The format's name; "fields" where the recipe names the fields.
        form: The format.
        unread: How many rows have a field that is not read, by name.
    """

    name: str
    form: Format
    unread: Counter[str] = field(default_factory=Counter)

    def convert(self, row: Row) -> Conversation | Document:
        """The conversation or the document of a row.

        Raises:
            RowError: The row does not hold what its format needs, or cannot be trained.
        """
        fields = Fields(row.fields)
        check_media(row.fields)
        check_preferences(row.fields, self.form.needs)
        self._check_needs(fields, row.fields)
        made = self.form.convert(fields)
        if isinstance(made, str):
            self._count(fields, row.fields)
            return Document(made, row.place)
        messages, tools = made
        for name in ("tools", "functions"):
            if name in fields and (name in self.form.reads):
                tools += read_tools(fields.named(name), fields.get(name))
        self._count(fields, row.fields)
        return Conversation(check_turns(messages, tools), row.place, tools)

    def _check_needs(self, fields: Fields, row: Mapping[str, Any]) -> None:
        missing = [name for name in self.form.needs if name not in fields]
        if not missing:
            return
        near = next((own for own in row if _is_near(own.lower(), missing[0])), None)
        likely = f"; '{near}' may be it, misspelt" if near else ""
        needs = f"the format '{self.name}' needs it" if self.name != "fields" else columns(row)
        problem = f"field '{missing[0]}' is missing{likely}; {needs}"
        raise RowError(MISSING, problem, missing[0])

    def _count(self, fields: Fields, row: Mapping[str, Any]) -> None:
        """Counts fields that were not read; RowError for one that looks like a misspelt one."""
        for name in fields.unread():
            absent = (known for known in self.form.reads if known not in fields)
            meant = next((known for known in absent if _is_near(name.lower(), known)), None)
            if meant is not None and name.lower() not in _KNOWN:
                problem = f"field '{name}' is not read; '{meant}' may be meant"
                raise RowError("misspelt field", problem, name)
            if name.lower() not in COLUMNS:
                self.unread[name] += 1


def _is_near(name: str, known: str) -> bool:
    """True if a name looks like a typing error of a known one."""
    alike = difflib.SequenceMatcher(None, name, known).ratio()
    return name != known and abs(len(name) - len(known)) <= 2 and alike >= 0.8


def converter_of(rows: Sequence[Row], options: RowOptions = RowOptions()) -> Converter:
    """The converter for the rows of a file.

    Args:
        rows: The first rows of the file.
        options: Names of the fields or of the format, where they are given.

    Raises:
        UsageError: Only one of the two fields is named, or no format has the given name.
        DataError: No format has the fields of the rows.
    """
    if (options.input_field is None) != (options.output_field is None):
        given, other = ("input", "output") if options.input_field is not None else ("output", "input")
        remedy = f"Give both or neither: {columns(rows[0].fields)}"
        raise UsageError(f"--{given}-field needs --{other}-field", remedy=remedy)
    if options.input_field is not None and options.output_field is not None:
        return Converter("fields", _two(options.input_field, options.output_field))
    name = options.format or _recognised(rows)
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}", remedy=f"Name one of {', '.join(FORMATS)}.")
    return Converter(name, FORMATS[name])


def columns(fields: Mapping[str, Any]) -> str:
    """The names of the fields of the first row, in words."""
    shown = [repr(name if len(name) <= 60 else f"{name[:57]}...") for name in list(fields)[:30]]
    more = f" and {len(fields) - 30:,} more" if len(fields) > 30 else ""
    return f"the fields of the first row are {', '.join(shown)}{more}"


def format_of(fields: Mapping[str, Any]) -> str | None:
    """The name of the format that has these fields."""
    names = {name.lower() for name in fields}
    return next((name for name, form in FORMATS.items() if names >= set(form.needs)), None)


def _recognised(rows: Sequence[Row]) -> str:
    """The format of the first row that has one."""
    for row in rows:
        check = row.fields
        if (name := format_of(check)) is not None:
            return name
    first = rows[0]
    try:
        check_media(first.fields)
        check_preferences(first.fields, ())
    except RowError as error:
        raise DataError(str(error), where=first.place, remedy=error.remedy) from None
    raise _unknown(first)


def _unknown(first: Row) -> DataError:
    """The error for rows whose fields no format has, with the likely names of misspelt ones."""
    known = "; ".join(f"{name}: {', '.join(form.needs)}" for name, form in FORMATS.items())
    own = {name.lower() for name in first.fields}
    likely = [
        f"'{name}' may be '{meant}', misspelt"
        for name in list(first.fields)[:30]
        for meant in sorted(_KNOWN - own)
        if name.lower() not in _KNOWN and _is_near(name.lower(), meant)
    ]
    return DataError(
        "; ".join(["no data format has these fields", *likely[:3], columns(first.fields)]),
        where=first.place,
        remedy=f"Name the fields with --input-field and --output-field, or use a known format ({known}).",
    )


def other_format(row: Row, converter: Converter) -> str | None:
    """The name of the format of a row of another format than its file's."""
    if converter.name == "fields" or all(name in Fields(row.fields) for name in converter.form.needs):
        return None
    return format_of(row.fields)


def conversations(
    rows: Sequence[Row], input_field: str | None = None, output_field: str | None = None
) -> tuple[str, list[Conversation | Document]]:
    """The name of the rows' data format, and a conversation or a document for each row.

    Raises:
        DataError: Rows that do not hold what the format needs, with the first places.
    """
    converter = converter_of(rows, RowOptions(input_field, output_field))
    refuse_mixed(rows, converter)
    made: list[Conversation | Document] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            made.append(converter.convert(row))
        except RowError as error:
            problems.append(error.at(row.place))
    if problems:
        found = [(problem.place, problem.text) for problem in problems]
        refuse(found, "Correct these rows or take them out of the file.")
    return converter.name, made


def refuse_mixed(rows: Iterable[Row], converter: Converter) -> None:
    """Raises DataError for rows of several formats in one file."""
    first: dict[str, Row] = {}
    for row in rows:
        name = other_format(row, converter)
        if name is not None or all(need in Fields(row.fields) for need in converter.form.needs):
            first.setdefault(name or converter.name, row)
    if len(first) > 1:
        places = ", ".join(f"'{name}' first in {row.place}" for name, row in first.items())
        raise DataError(
            f"the rows have {len(first)} formats: {places}",
            where=next(iter(first.values())).place,
            remedy="Put the rows of each format into a file of its own.",
        )


def to_row(made: Conversation | Document) -> dict[str, Any]:
    """The row of a conversation in the format 'messages', or of a document in the format 'text'."""
    if isinstance(made, Document):
        return {"text": made.text}
    row: dict[str, Any] = {"messages": [_message_row(message) for message in made.messages]}
    return row | ({"tools": [dict(tool) for tool in made.tools]} if made.tools else {})


def _message_row(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        row["reasoning_content"] = message.reasoning
    if message.tool_calls:
        row["tool_calls"] = [
            {
                **({"id": call.id} if call.id is not None else {}),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.name is not None:
        row["name"] = message.name
    if message.call_id is not None:
        row["tool_call_id"] = message.call_id
    return row if message.trained is None else {**row, "weight": int(message.trained)}
