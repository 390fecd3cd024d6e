"""Conversations in the forms that people have them, turned into one: role, content, and what a template reads besides.

Read are OpenAI's messages (content as text, as parts or null beside tool calls; tool_calls, function_call; weight) and
ShareGPT's turns (from, value). A message that must not be learnt carries weight 0, whatever it was marked with.
"""

from __future__ import annotations

import json
from typing import Any

from lisa_kernels.errors import InputError

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "function": "tool", "observation": "tool",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")
UNLEARNT_MARKS = ("weight", "train", "loss")
READ_OTHERWISE = {"from", "value", "function_call", "tool_calls", "role", "content", *UNLEARNT_MARKS}
Message = dict[str, Any]


def type_name(value: object) -> str:
    """Return what JSON calls a value's type."""
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def checked_string(value: object, name: str, where: str) -> str:
    """Return a value that is text which UTF-8 can hold; raises InputError for any other."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is {type_name(value)}, a string is wanted.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {name} holds half a surrogate pair, which is no text: remove it.") from error
    return value


def checked_messages(found: object, name: str, where: str) -> list[Message]:
    """Return the messages of a conversation in the one form; `name` is the field that held them."""
    if isinstance(found, str) and found.lstrip().startswith("["):
        found = _parsed(found, repr(name), where)
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        shape = "a list with something else in it" if isinstance(found, list) else type_name(found)
        raise InputError(f"{where}: {name!r} is {shape}, a list of objects with 'role' and 'content' is wanted.")
    return [_checked_message(message, f"message {n}", where) for n, message in enumerate(found, start=1)]


def checked_tools(found: object, where: str) -> list[dict[str, Any]]:
    """Return tools in OpenAI's form; read are a list or its JSON text, each tool in that form or bare."""
    if isinstance(found, str):
        found = _parsed(found, "'tools'", where) if found.strip() else None
    tools = found if isinstance(found, list) else [] if found is None else [found]
    return [_checked_tool(without_nulls(tool), f"tool {number}", where) for number, tool in enumerate(tools, start=1)]


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its objects, which tables fill in where a row has none."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parsed(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {name} is text that is not JSON ({error}): a list of objects is wanted.") from error


def _checked_tool(tool: Any, name: str, where: str) -> dict[str, Any]:
    if isinstance(tool, str) and tool.lstrip().startswith("{"):
        tool = _parsed(tool, name, where)
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        shape = ", ".join(map(repr, tool)) if isinstance(tool, dict) else type_name(tool)
        raise InputError(
            f"{where}: {name} is no JSON schema of a function but has {shape or 'no fields'}:"
            " an object with 'name', 'description' and 'parameters' is wanted, alone or as 'function'."
        )
    parameters = function.get("parameters", function.get("input_schema", {}))
    if isinstance(parameters, str):
        parameters = _parsed(parameters, f"'parameters' of {name}", where)
    if not isinstance(parameters, dict):
        raise InputError(
            f"{where}: 'parameters' of {name} is {type_name(parameters)}: a JSON schema, so an object, is wanted."
        )
    kept = {key: value for key, value in function.items() if key not in ("type", "input_schema")}
    return {"type": "function", "function": {**kept, "parameters": parameters}}


def _checked_message(raw: Message, name: str, where: str) -> Message:
    message = without_nulls(raw)
    role = message.get("role", message.get("from"))
    if role is None or not ({"content", "value"} & raw.keys() or {"tool_calls", "function_call"} & message.keys()):
        names = ", ".join(map(repr, raw)) or "no fields"
        raise InputError(f"{where}: {name} has {names}: 'role' and 'content' wanted.")
    said_as = checked_string(role, f"'role' of {name}", where).strip().lower()
    content: Any = message.get("content", message.get("value"))
    calls = _calls(message, name, where)
    if said_as == "function_call" and not calls:
        calls, content = [_checked_call(content, name, where)], None
    if content is None and not calls:
        raise InputError(f"{where}: 'content' of {name} is null, a string is wanted.")
    checked: Message = {"role": ROLES.get(said_as, said_as), "content": _content(content, said_as, name, where)}
    if calls:
        checked["tool_calls"] = calls
    if _is_unlearnt(message, name, where):
        checked["weight"] = 0
    return {**checked, **{key: value for key, value in message.items() if key not in READ_OTHERWISE}}


def _content(content: Any, role: str, name: str, where: str) -> str:
    """Return a message's content as text: parts are joined, what a tool gave back is JSON."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        for part in content:
            if part["type"] not in TEXT_PARTS:
                raise InputError(
                    f"{where}: 'content' of {name} has a part of type {part['type']!r}: only text is learnt;"
                    " leave such rows out."
                )
        return "".join(checked_string(part.get("text"), f"a part of 'content' of {name}", where) for part in content)
    if ROLES.get(role, role) in ("tool", "ipython") and not isinstance(content, str):
        return json.dumps(content, ensure_ascii=False)
    return checked_string(content, f"'content' of {name}", where)


def _calls(message: Message, name: str, where: str) -> list[Message]:
    calls = message.get("tool_calls") or []
    if isinstance(calls, str):
        calls = _parsed(calls, f"'tool_calls' of {name}", where) if calls.strip() else []
    if "function_call" in message:
        calls = [message["function_call"]]
    if not isinstance(calls, list):
        raise InputError(f"{where}: 'tool_calls' of {name} is {type_name(calls)}, a list of objects is wanted.")
    return [_checked_call(call, name, where) for call in calls]


def _checked_call(call: Any, name: str, where: str) -> Message:
    """Return a call in OpenAI's form, its arguments as an object."""
    if isinstance(call, str):
        call = _parsed(call, f"the call of {name}", where)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: a call of {name} names no function: 'name' and 'arguments' are wanted.")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"'arguments' of a call of {name}", where) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise InputError(f"{where}: 'arguments' of a call of {name} is {type_name(arguments)}, an object is wanted.")
    beside = {"id": call["id"]} if "id" in call else {}
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}, **beside}


def _is_unlearnt(message: Message, name: str, where: str) -> bool:
    """Tell whether a message is marked as one that must not be learnt."""
    for mark in UNLEARNT_MARKS:
        value = message.get(mark, 1)
        if value not in (0, 1):
            raise InputError(f"{where}: {mark!r} of {name} is {value!r}: 0 (not learnt) or 1 (learnt) is wanted.")
        if not value:
            return True
    return False
