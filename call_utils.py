"""Ids of tool calls, in the form that a chat template demands: rows of data have others, or none.

Such ids are made as the servers of these models make them, but out of the call itself, so that the same conversation
has the same ids in training and at inference. A call and its result share one.
"""

import json
import re
from collections import namedtuple

from file_utils import sha256

NINE = re.compile(r"[A-Za-z0-9]{9}")
# what a user is told of it; the id of a call, from the id that it has or None, its function and its place among a
# conversation's calls. An id that is taken stays as it is
IdForm = namedtuple("IdForm", "description make")


def make_any(given, function, place):
    return given or make_nine(None, function, place)


def make_nine(given, function, place):
    """The last nine characters of the id, as vLLM shortens ids for Mistral's models, or made ones."""
    if given and NINE.fullmatch(given[-9:]):
        return given[-9:]
    text = json.dumps([place, function["name"], function["arguments"]], ensure_ascii=False)
    return sha256([text.encode("ascii", "ignore")])[:9]  # without stand-ins for control tokens, which may differ


def make_named(given, function, place):
    """Kimi's ids, which hold all that its templates write of a call's name."""
    name = function["name"]
    taken = given and re.fullmatch(rf"(functions\.)?{re.escape(name)}:\d+", given)
    return given if taken else f"functions.{name}:{place}"


ID_FORMS = {
    "any": IdForm("an id for each call", make_any),
    "nine": IdForm("ids of nine letters or digits", make_nine),
    "named": IdForm("ids such as functions.search:0", make_named),
}


def with_ids(messages, form):
    """The messages with their calls' ids in this form of ID_FORMS, and the same ids in the results of these calls.

    A result without an id is that of the first call that has none yet, of the same name if it has a name.
    """
    made, waiting, place = [], [], 0
    for message in messages:
        if "tool_calls" in message:
            calls, waiting = [], []
            for call in message["tool_calls"]:
                calls.append({"id": ID_FORMS[form].make(call.get("id"), call["function"], place)} | without_id(call))
                waiting.append((call.get("id"), call["function"]["name"], calls[-1]["id"]))
                place += 1
            message = message | {"tool_calls": calls}
        elif message["role"] == "tool" and (call := find_call(message, waiting)):
            waiting.remove(call)
            message = message | {"tool_call_id": call[2]}
        made.append(message)
    return made


def without_id(call):
    return {key: value for key, value in call.items() if key != "id"}


def find_call(result, waiting):
    """The one of the (id, name, new id) of calls that wait for their result to which this one belongs, or None."""
    if result.get("tool_call_id") and any(given for given, _, _ in waiting):
        return next((call for call in waiting if call[0] == result["tool_call_id"]), None)
    named = (call for call in waiting if call[1] == result.get("name"))
    return next(named, next(iter(waiting), None))


def forms_taken(call, place):
    """The names of the ID_FORMS that leave a call's id as it is."""
    given = call.get("id")
    return [name for name, form in ID_FORMS.items() if given and form.make(given, call["function"], place) == given]
