"""How a row of each schema becomes an example, and how an example is written as a row of each schema.

Every converter takes a row whose columns are there and may be wrong, its place for errors, and label names; every
inverse gives a row that the converter turns into the same example, or raises DataError if that schema cannot hold it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tunekit.core.data.conversations import check_messages, check_text, check_tools, even_out, is_plain, kind_of, shown
from tunekit.core.data.preferences import from_transcript, is_transcript
from tunekit.errors import DataError

NO_INPUT = frozenset({"", "<noinput>", "<no input>", "[no input]", "(no input)", "noinput", "no input", "n/a"})
"""What stands in Alpaca's `input` where there is none, in lower case and without a full stop at the end."""

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


def from_messages(row: Mapping[str, Any], where: str, labels: Sequence[str]) -> dict[str, Any]:
    """OpenAI's form, tool calls, `tools` and `weight` included; an HH-RLHF transcript is taken apart."""
    messages = row["messages"]
    if not is_plain(messages):
        messages = from_transcript(messages) if is_transcript(messages) else even_out(messages, where)
        check_messages(messages, where)
    return _with_tools({"messages": messages}, row["tools"], where) if "tools" in row else {"messages": messages}


def from_conversations(row: Mapping[str, Any], where: str, labels: Sequence[str]) -> dict[str, Any]:
    """ShareGPT's form. `function_call` holds the call as JSON; a column `system` comes before the first turn."""
    turns = row["conversations"]
    if not isinstance(turns, list | tuple):
        raise DataError(f"{where}: expected a list of turns, got {kind_of(turns)} (conversations)")
    if all(isinstance(turn, Mapping) and "role" in turn and "from" not in turn for turn in turns):
        messages = even_out(turns, where)
    else:
        messages = [_from_turn(turn, f"conversations[{index}]", where) for index, turn in enumerate(turns)]
    system = row.get("system")
    if system:
        check_text(system, "system", where)
        messages = [{"role": "system", "content": system}, *messages]
    try:
        check_messages(messages, where)
    except DataError as error:
        raise DataError(_renamed(str(error), turns, bool(system))) from None
    return _with_tools({"messages": messages}, row.get("tools"), where)


def _from_turn(turn: Any, field: str, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: expected an object with from and value, got {kind_of(turn)} ({field})")
    for key in ("from", "value"):
        if key not in turn:
            raise DataError(f"{where}: missing ({field}.{key})")
    speaker = turn["from"]
    more = {key: turn[key] for key in ("weight", "train") if turn.get(key) is not None}
    if speaker == "function_call":
        check_text(turn["value"], f"{field}.value", where)
        return {"role": "assistant", "tool_calls": _calls(turn["value"], field, where), **more}
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise DataError(f"{where}: unknown speaker {shown(speaker)}; known: {', '.join(_SPEAKERS)} ({field}.from)")
    return {"role": _SPEAKERS[speaker], "content": turn["value"], **more}


def _calls(text: str, field: str, where: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f"{where}: a function call must be JSON with name and arguments ({field}.value)")
    return [{"type": "function", "function": call} for call in calls]


def _renamed(message: str, turns: Sequence[Any], system: bool) -> str:
    """An error about messages in the words of turns."""
    for index in range(len(turns), -1, -1):
        ours = f"conversations[{index - system}]" if index >= system else "system"
        message = message.replace(f"(messages[{index}]", f"({ours}")
    keys = {".role)": ".from)", ".content)": ".value)"} if turns and "from" in turns[0] else {}
    for ours, theirs in keys.items():
        message = message.replace(ours, theirs)
    return message.replace("(messages)", "(conversations)")


def from_prompt(row: Mapping[str, Any], where: str, labels: Sequence[str]) -> dict[str, Any]:
    """Prompt and completion, each a text or a list of messages (TRL's conversational form).

    Only the completion is learned: an answer within the prompt gets weight 0.
    """
    prompt, completion = row["prompt"], row["completion"]
    if type(prompt) is str and type(completion) is str:
        return dialogue(prompt, completion, "prompt", "completion", where, _tools_of(row))
    sides = []
    for name, value, role in (("prompt", prompt, "user"), ("completion", completion, "assistant")):
        if isinstance(value, list | tuple):
            sides.append(_even(value, name, where))
        else:
            check_text(value, name, where)
            sides.append([{"role": role, "content": value}])
    asked = [
        {**message, "weight": 0}
        if message.get("role") == "assistant" and not {"weight", "train"} & message.keys()
        else message
        for message in sides[0]
    ]
    if not sides[1] or sides[1][0].get("role") != "assistant":
        raise DataError(f"{where}: the completion must begin with the assistant (completion)")
    messages = [*asked, *sides[1]]
    check_messages(messages, where)
    return _with_tools({"messages": messages}, row.get("tools"), where)


def from_instruction(row: Mapping[str, Any], where: str, labels: Sequence[str]) -> dict[str, Any]:
    """Alpaca's form: the input, if there is one, follows the instruction after an empty line."""
    more = row.get("input")
    if more is not None:
        check_text(more, "input", where)
    return _instructed(row["instruction"], more, row["output"], "output", where)


def from_context(row: Mapping[str, Any], where: str, labels: Sequence[str]) -> dict[str, Any]:
    """Dolly's form: the context, if there is one, follows the instruction after an empty line."""
    more = row.get("context")
    if more is not None:
        check_text(more, "context", where)
    return _instructed(row["instruction"], more, row["response"], "response", where)


def _instructed(instruction: Any, more: str | None, answer: Any, name: str, where: str) -> dict[str, Any]:
    check_text(instruction, "instruction", where)
    if more and more.strip().rstrip(".").lower() not in NO_INPUT:
        instruction = f"{instruction}\n\n{more}" if instruction.strip() else more
    return dialogue(instruction, answer, "instruction", name, where)


def from_question(row: Mapping[str, Any], where: str, labels: Sequence[str]) -> dict[str, Any]:
    """A question and its answer."""
    return dialogue(row["question"], row["answer"], "question", "answer", where)


def from_label(row: Mapping[str, Any], where: str, labels: Sequence[str]) -> dict[str, Any]:
    """Classification: the text is what the user says, the label's name what the assistant answers."""
    label = row["label"]
    if isinstance(label, int) and not isinstance(label, bool):
        if not labels:
            raise DataError(f"{where}: label {label} has no name; give labels=('its name', ...) (label)")
        if not 0 <= label < len(labels):
            raise DataError(f"{where}: label {label}, and there are {len(labels)} names, from 0 on (label)")
        label = labels[label]
    elif labels and isinstance(label, str) and label not in labels:
        number = int(label) if label.isdecimal() and label.isascii() and len(label) < 10 else len(labels)
        if number >= len(labels):
            raise DataError(f"{where}: label {shown(label)} is none of {', '.join(labels)} (label)")
        label = labels[number]
    return dialogue(row["text"], label, "text", "label", where)


def from_text(row: Mapping[str, Any], where: str, labels: Sequence[str]) -> dict[str, Any]:
    """Plain text, learned whole."""
    text = row["text"]
    check_text(text, "text", where)
    if not text or text.isspace():
        raise DataError(f"{where}: empty text (text)")
    return {"text": text}


def dialogue(
    prompt: Any, answer: Any, asked: str, answered: str, where: str, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One question of the user and one answer; errors name the columns they came from."""
    if type(prompt) is not str or not prompt.isascii():
        check_text(prompt, asked, where)
    if type(answer) is not str or not answer.isascii():
        check_text(answer, answered, where)
    if not answer or answer.isspace():
        raise DataError(f"{where}: empty answer, nothing to learn from ({answered})")
    example = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
    return _with_tools(example, more.get("tools"), where) if more else example


def _even(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    try:
        return even_out(value, where)
    except DataError as error:
        raise DataError(str(error).replace("(messages", f"({name}")) from None


def _tools_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    return {"tools": row["tools"]} if "tools" in row else None


def _with_tools(example: dict[str, Any], tools: Any, where: str) -> dict[str, Any]:
    """The example with `tools`, which some data sets write as JSON in a text."""
    if tools is None or tools == "":
        return example
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise DataError(f"{where}: expected a list of tools, or one as JSON, got text (tools)") from None
    check_tools(tools, where)
    return {**example, "tools": tools}
