"""Converts rows to conversations and documents. Each data format is one entry in `FORMATS`.

The format is recognised from the fields of the rows, in any letter case, and is the same for all rows of a
file. A row that lacks what its format needs is an error with its place; no row is skipped silently.
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
    one_answer,
    openai_messages,
    prompt_completion,
    sharegpt,
    two_fields,
)
from talik.data.formats.fields import MISSING, Fields
from talik.data.formats.media import COLUMNS, check_media
from talik.data.formats.preferences import check_preferences
from talik.data.formats.tools import read_tools
from talik.data.formats.turn_rules import check_turns
from talik.data.messages import Conversation, Document, Message, ToolCall
from talik.data.reading.rows import Problem, Row, RowError, refuse

OTHER_FORMAT = "another format"


@dataclass(frozen=True, slots=True)
class Format:
    """A data format.

    Attributes:
        needs: The fields that a row must have.
        convert: Converts a row's fields to messages and tools, or to the text of a document; raises RowError.
        reads: Other fields that a row may have.
    """

    needs: tuple[str, ...]
    convert: Callable[[Fields], Converted]
    reads: tuple[str, ...] = ("system", "history", "tools")


@dataclass(frozen=True, slots=True)
class RowOptions:
    """The options for reading rows: the fields of a recipe with the same names."""

    input_field: str | None = None
    output_field: str | None = None
    format: str | None = None


def _two(asked: str, answered: str, answer: Callable[[Fields, str], str] = Fields.text) -> Format:
    """Returns the format of a question and an answer in two fields."""
    return Format((asked, answered), two_fields(asked, answered, answer))


_INSTRUCTION_FIELDS = ("input", "context", "system", "history", "tools")
_LIST_FIELDS = ("system", "tools", "functions")
# In order: a row has the first format whose needed fields it has. 'instruction' rows may have 'input' and
# 'output'.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), openai_messages, _LIST_FIELDS),
    "conversations": Format(("conversations",), sharegpt, _LIST_FIELDS),
    "instruction": Format(("instruction", "output"), instruction("output"), _INSTRUCTION_FIELDS),
    "instruction-response": Format(("instruction", "response"), instruction("response"), _INSTRUCTION_FIELDS),
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
_KNOWN_FIELDS = {name for form in FORMATS.values() for name in (*form.needs, *form.reads)} | {
    "chosen",
    "rejected",
}


@dataclass(slots=True)
class Converter:
    """Converts the rows of one file, and counts the fields that the format does not use.

    Attributes:
        name: The name of the format; "fields" if the options name the fields.
        form: The format.
        unread: For each field that is not used, the number of rows that have it.
    """

    name: str
    form: Format
    unread: Counter[str] = field(default_factory=Counter[str])

    def convert(self, row: Row) -> Conversation | Document:
        """Converts a row.

        Raises:
            RowError: The row is of another format, lacks a field, or cannot be trained on.
        """
        fields = Fields(row.fields)
        missing = [name for name in self.form.needs if name not in fields]
        if missing:
            self._check_same_format(row.fields)
        check_media(row.fields)
        check_preferences(row.fields, self.form.needs)
        if missing:
            raise self._missing(missing[0], row.fields)
        made = self.form.convert(fields)
        if isinstance(made, str):
            self._count_unread(fields)
            return Document(made, row.place)
        messages, tools = made
        for name in ("tools", "functions"):
            if name in fields and name in self.form.reads:
                tools += read_tools(fields.named(name), fields.get(name))
        self._count_unread(fields)
        return Conversation(check_turns(messages, tools), row.place, tools)

    def format_in_file(self, fields: Mapping[str, Any]) -> str | None:
        """Returns the format of a row: that of the file if the row has its fields, else another, or None."""
        names = Fields(fields)
        return self.name if all(name in names for name in self.form.needs) else self._other_format(fields)

    def _other_format(self, fields: Mapping[str, Any]) -> str | None:
        return None if self.name == "fields" else format_of(fields)

    def _check_same_format(self, fields: Mapping[str, Any]) -> None:
        if (other := self._other_format(fields)) is not None:
            raise RowError(OTHER_FORMAT, f"the row has the format '{other}', and its file '{self.name}'")

    def _missing(self, name: str, row: Mapping[str, Any]) -> RowError:
        """Returns the error for a missing field, with the field that may be misspelt."""
        near = next((own for own in row if _is_near(own.lower(), name)), None)
        likely = f"; '{near}' may be a misspelling of it" if near else ""
        needs = f"the format '{self.name}' needs it" if self.name != "fields" else columns(row)
        return RowError(MISSING, f"field '{name}' is missing{likely}; {needs}", name)

    def _count_unread(self, fields: Fields) -> None:
        """Counts fields that were not used; RowError for one that looks like a misspelling."""
        for name in fields.unread():
            absent = (known for known in self.form.reads if known not in fields)
            meant = next((known for known in absent if _is_near(name.lower(), known)), None)
            if meant is not None and name.lower() not in _KNOWN_FIELDS:
                problem = f"field '{name}' is not used; '{meant}' may be meant"
                raise RowError("misspelt field", problem, name)
            if name.lower() not in COLUMNS:
                self.unread[name] += 1


def _is_near(name: str, known: str) -> bool:
    """True if a name looks like a misspelling of a known one."""
    alike = difflib.SequenceMatcher(None, name, known).ratio()
    return name != known and abs(len(name) - len(known)) <= 2 and alike >= 0.8


def converter_of(rows: Sequence[Row], options: RowOptions = RowOptions()) -> Converter:
    """Returns the converter for the rows of a file.

    Args:
        rows: The first rows of the file; at least one, unless the options name the format or the fields.
        options: The names of the fields or of the format, if they are given.

    Raises:
        UsageError: Only one of the two fields is named, or the name of the format is not known.
        DataError: No format has the fields of the rows.
    """
    if (options.input_field is None) != (options.output_field is None):
        given, other = ("input", "output") if options.input_field is not None else ("output", "input")
        known = f": {columns(rows[0].fields)}" if rows else ""
        remedy = f"Give both or neither{known}"
        raise UsageError(f"--{given}-field needs --{other}-field", remedy=remedy)
    if options.input_field is not None:
        return converter_named("fields", options)
    return converter_named(options.format or _recognised(rows), options)


def converter_named(name: str, options: RowOptions) -> Converter:
    """Returns the converter of a format; "fields" is the format of the two fields that the options name.

    Raises:
        UsageError: The name of the format is not known.
    """
    if name == "fields" and options.input_field is not None and options.output_field is not None:
        return Converter("fields", _two(options.input_field, options.output_field))
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}", remedy=f"Name one of {', '.join(FORMATS)}.")
    return Converter(name, FORMATS[name])


def columns(fields: Mapping[str, Any]) -> str:
    """Lists the names of the fields of the first row."""
    shown = [repr(name if len(name) <= 60 else f"{name[:57]}...") for name in list(fields)[:30]]
    more = f" and {len(fields) - 30:,} more" if len(fields) > 30 else ""
    return f"the fields of the first row are {', '.join(shown)}{more}"


def format_of(fields: Mapping[str, Any]) -> str | None:
    """Returns the name of the first format whose needed fields are among these; None if there is none."""
    names = {name.lower() for name in fields}
    return next((name for name, form in FORMATS.items() if names >= set(form.needs)), None)


def _recognised(rows: Sequence[Row]) -> str:
    """Returns the format of the first row that has one."""
    for row in rows:
        if (name := format_of(row.fields)) is not None:
            return name
    first = rows[0]
    try:
        check_media(first.fields)
        check_preferences(first.fields, ())
    except RowError as error:
        raise DataError(str(error), where=first.place, remedy=error.remedy) from None
    raise _unknown(first)


def _unknown(first: Row) -> DataError:
    """Returns the error for fields that no format has, with likely misspellings."""
    known = "; ".join(f"{name}: {', '.join(form.needs)}" for name, form in FORMATS.items())
    own = {name.lower() for name in first.fields}
    likely = [
        f"'{name}' may be a misspelling of '{meant}'"
        for name in list(first.fields)[:30]
        for meant in sorted(_KNOWN_FIELDS - own)
        if name.lower() not in _KNOWN_FIELDS and _is_near(name.lower(), meant)
    ]
    return DataError(
        "; ".join(["no data format has these fields", *likely[:3], columns(first.fields)]),
        where=first.place,
        remedy=f"Name the fields with --input-field and --output-field, or use a known format ({known}).",
    )


def conversations(
    rows: Sequence[Row], input_field: str | None = None, output_field: str | None = None
) -> tuple[str, list[Conversation | Document]]:
    """Converts all rows of a file.

    Returns:
        The name of the data format, and a conversation or a document for each row.

    Raises:
        DataError: Rows cannot be converted; the error lists the first places.
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
        refuse(found, "Correct these rows or remove them from the file.")
    return converter.name, made


def refuse_mixed(rows: Iterable[Row], converter: Converter) -> None:
    """Checks that all rows have one format.

    Raises:
        DataError: The rows have several formats.
    """
    first: dict[str, Row] = {}
    for row in rows:
        if (name := converter.format_in_file(row.fields)) is not None:
            first.setdefault(name, row)
    if len(first) > 1:
        places = ", ".join(f"'{name}' first in {row.place}" for name, row in first.items())
        raise DataError(
            f"the rows have {len(first)} formats: {places}",
            where=next(iter(first.values())).place,
            remedy="Put the rows of each format into a file of its own.",
        )


def to_row(made: Conversation | Document) -> dict[str, Any]:
    """Returns a conversation as a row of the format 'messages', or a document as one of 'text'."""
    if isinstance(made, Document):
        return {"text": made.text}
    row: dict[str, Any] = {"messages": [_message_row(message) for message in made.messages]}
    return row | ({"tools": [dict(tool) for tool in made.tools]} if made.tools else {})


def _call_row(call: ToolCall) -> dict[str, Any]:
    identity = {} if call.id is None else {"id": call.id}
    return {**identity, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _message_row(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        row["reasoning_content"] = message.reasoning
    if message.tool_calls:
        row["tool_calls"] = [_call_row(call) for call in message.tool_calls]
    if message.name is not None:
        row["name"] = message.name
    if message.call_id is not None:
        row["tool_call_id"] = message.call_id
    return row if message.trained is None else {**row, "weight": int(message.trained)}
