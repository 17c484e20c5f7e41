"""The rule of prompts on chat templates as models are published with: python benchmarks/templates.py FOLDER

FOLDER holds *.jinja files and index.json, {"name": {"special": [control tokens], "eos_token": "..."}}. Each template is
put on the bundled tokenizer, and every kind of conversation is tried on it. In the table stand "yes" where each answer
is trained behind the prompt that plain apply_chat_template writes, up to its stop token; "yes, N rows" where each
answer needed a row of its own; "unused" where the template has no place for reasoning_content, which a run names; and
the number of a reason where the rows are refused with one line. Anything else is an error of ours, and the exit code
is 1.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import encoding_utils
import model_utils
import prompt_utils
import thought_utils
from message_utils import UserError, quiet_libraries
from token_utils import check_answers

THOUGHT = "<think>\nI count: one, two.\n</think>\n\nIt is two."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_stock",
            "description": "How many are left",
            "parameters": {
                "type": "object",
                "properties": {"item": {"type": "string", "description": "Its name"}},
                "required": ["item"],
            },
        },
    }
]
CALLS = [{"id": "call12345", "type": "function", "function": {"name": "get_stock", "arguments": {"item": "lamp"}}}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **others):
    return {"role": "assistant", "content": text} | others


SEVERAL = [user("First question"), assistant("Answer one."), user("Second question"), assistant("Answer two.")]
CONVERSATIONS = {
    "single": SEVERAL[:2],
    "several": SEVERAL,
    "system": [{"role": "system", "content": "Be brief."}, *SEVERAL],
    "blanks": [user(" q \n"), assistant(" Answer one. \n"), user("\n q"), assistant("\n\nAnswer two.")],
    "thoughts": [user("First"), assistant(THOUGHT), user("Second"), assistant(THOUGHT.replace("two", "three"))],
    "mixed": [user("First"), assistant(THOUGHT), user("Second"), assistant("Answer two.")],
    "reasoning": [user("First"), assistant("It is two.", reasoning_content="I count: one, two.")],
    "calls": [
        user("Is the lamp there?") | {"tools": TOOLS},
        assistant("", tool_calls=CALLS),
        {"role": "tool", "name": "get_stock", "tool_call_id": "call12345", "content": '{"left": 3}'},
        assistant("Three are left."),
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    quiet_libraries()
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    reasons, totals, wrong = {}, {kind: Counter() for kind in CONVERSATIONS}, 0
    print("template".ljust(48), *(kind.ljust(11) for kind in CONVERSATIONS))
    for name, entry in index.items():
        cells = []
        for kind, messages in CONVERSATIONS.items():
            tokenizer = put_on_tokenizer((folder / f"{name}.jinja").read_text(encoding="utf-8"), entry)
            prompt_utils.set_thinking(tokenizer, kind in ("thoughts", "mixed", "reasoning"))
            outcome, reason = try_conversation(tokenizer, messages)
            if reason:
                outcome = f"no ({reasons.setdefault(reason, len(reasons) + 1)})"
            totals[kind][outcome.split()[0].strip(",")] += 1
            wrong += outcome.startswith("WRONG")
            cells.append(outcome)
        print(name[:48].ljust(48), *(cell.ljust(11) for cell in cells), flush=True)
    print("right".ljust(48), *(f"{counts['yes']} of {counts.total()}".ljust(11) for counts in totals.values()))
    for reason, number in reasons.items():
        print(f"({number}) {reason}")
    return min(wrong, 1)


def put_on_tokenizer(template, entry):
    """The bundled tokenizer with a published template, its control tokens and its end-of-text token."""
    tokenizer = model_utils.load_tokenizer("models/tiny-base")
    tokenizer.add_special_tokens({"additional_special_tokens": entry["special"], "eos_token": entry["eos_token"]})
    tokenizer.chat_template = template
    return tokenizer


def try_conversation(tokenizer, messages):
    """(outcome, None), or ("no", the reason) of a conversation that is refused."""
    try:
        end_token = prompt_utils.find_end_token(tokenizer)
        texts = prompt_utils.mark_answers(tokenizer, messages, end_token)
    except UserError as error:
        return "no", str(error)
    uses_reasoning = prompt_utils.uses_reasoning(tokenizer)
    try:
        rows = check_rule(tokenizer, messages, texts, end_token, uses_reasoning)
    except AssertionError as error:
        return f"WRONG {error}", None
    if not uses_reasoning and any("reasoning_content" in message for message in messages):
        return "unused", None
    return "yes" if rows == 1 else f"yes, {rows} rows", None


def check_rule(tokenizer, messages, texts, end_token, uses_reasoning):
    """Assert the rule of prompts for the MarkedTexts of a conversation; returns how many rows they are."""
    stops = prompt_utils.end_token_ids(tokenizer)
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    places = iter(indices)
    rows, last = list(encoding_utils.encode_texts(tokenizer, texts)), None
    for row in rows:
        text = texts[row.position]
        check_answers(text, end_token, "conversation")
        answers = text.answers if row.position != last else []  # else the first row of the text has seen to them
        last = row.position
        for start, end in answers:
            place = next(places)
            message, before = messages[place], messages[:place]
            tools = before[0].get("tools")
            plain = prompt_utils.render(tokenizer, before, True)
            shown = [prompt_utils.public(message) for message in before]
            if not any("tool_calls" in message for message in before):
                if prompt_utils.takes_parts(tokenizer, str(tokenizer.chat_template)):
                    shown = list(map(prompt_utils.in_parts, shown))
                served = tokenizer.apply_chat_template(shown, tools=tools, tokenize=False, add_generation_prompt=True)
                assert served == plain, "the prompt is not what servers write"
                served_ids = tokenizer(served, add_special_tokens=False)["input_ids"]
                assert served_ids == encoding_utils.encode_prompt(tokenizer, before), "servers have other ids"
            assert text.text[:start] == plain, "an answer does not follow its prompt"
            ids = encoding_utils.encode_prompt(tokenizer, before)
            its_rows = [other for other in rows if other.position == row.position]
            assert any(other.ids[: len(ids)].tolist() == ids for other in its_rows), "the prompt's ids differ"
            answer = text.text[start:end]
            thought, words = thought_utils.split_inline(message["content"])
            thought = thought or (message.get("reasoning_content", "") if uses_reasoning else "")
            names = [call["function"]["name"] for call in message.get("tool_calls", ())]
            for part in (thought.strip(), words.strip(), *names):
                assert part in answer, f"{part!r} is not trained"
            check_thought(plain, answer, thought)
            others = [other["content"].strip() for other in messages if other is not message]
            assert not any(other and other in answer for other in others), "another turn is trained"
            assert answer.endswith(end_token) or names, "the answer does not end with the stop token"
            called = bool(names)
        assert row.ids[row.trained][-1] in stops or called, "no stop token is trained"
    assert next(places, None) is None, "an answer is missing"
    return len(rows)


def check_thought(prompt, answer, thought):
    """Assert that a thought is opened once and closed once, in the prompt and the answer together."""
    begun = thought_utils.find_begun(prompt)
    is_open = bool(begun) and not begun.closed
    opened, closed = (
        sum(answer.count(mark) for mark in marks) for marks in (thought_utils.PAIRS, set(thought_utils.PAIRS.values()))
    )
    assert opened <= 1 - is_open, "a thought is opened twice"
    assert is_open <= closed <= 1, "a thought is closed twice or never"
    assert not thought or not opened or not closed or answer.find(thought.strip()) > 0, "a thought is outside its marks"


if __name__ == "__main__":
    sys.exit(main())
