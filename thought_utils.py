"""Thoughts of reasoning models as text: in rows of data, at the end of a prompt, at the start of an answer."""

import re
from collections import namedtuple

# How models write a thought, and how rows of data do (the first)
FORMS = (
    "<think>\n{}\n</think>\n\n",
    "<|START_THINKING|>{}<|END_THINKING|>",
    "[THINK]{}[/THINK]",
    "<|open|>think<|sep|>{}<|close|>think<|sep|>",
    "<|channel>thought\n{}\n<channel|>",
    "Here are my reasoning steps:\n{}\n[BEGIN FINAL RESPONSE]\n",
    "<seed:think>{}</seed:think>",
    "<mm:think>{}</mm:think>",
    "<think:opensource>{}</think:opensource>",
    "<|inner_prefix|>{}<|inner_suffix|>",
    "<thought>\n{}\n</thought>\n\n",
    "<thinking>\n{}\n</thinking>\n\n",
    "<reasoning>\n{}\n</reasoning>\n\n",
)
PAIRS = {opening.strip(): closing.strip() for opening, closing in (form.split("{}") for form in FORMS)}
MARKS = {*PAIRS, *PAIRS.values()}
OPENING, CLOSING = ("|".join(map(re.escape, marks)) for marks in (PAIRS, PAIRS.values()))
BEGUN = re.compile(rf"(?:({OPENING})(\s*)({CLOSING})?|(?:{CLOSING}))(\s*)$")
INLINE = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
UNENDED = re.compile(rf"\s*(?:{'|'.join(re.escape(mark) for mark in PAIRS if mark[0] in '<[')})")  # but for plain words
NO_PLACE = ("<|START_RESPONSE|>", "<|START_TEXT|>")  # a prompt that ends so has begun the answer's text
STAND_IN = "I think."  # shows how a template writes a thought

# What a prompt has written of a thought at its end: the text, the mark that opens it or None, whether it is closed
# already, and the blanks behind the last mark
Begun = namedtuple("Begun", "text mark closed blanks")
# The thought with which a turn begins, taken apart: what stands before and behind it, and the rest of the turn
Block = namedtuple("Block", "opening closing rest")


def split_inline(content, begun=None):
    """(thought, text) of an answer that begins with <think>...</think>, else ("", the answer).

    Where the prompt has Begun a thought, the answer may go on with it: then </think> alone divides them.
    """
    found = INLINE.fullmatch(content)
    if found:
        return found.groups()
    thought, closing, text = content.partition("</think>")
    if begun and not begun.closed and closing and "<think>" not in thought:
        return thought, text
    return "", content


def without_thought(answer):
    """What an answer says behind the thought that it begins with; "" where that thought has no end.

    Where the prompt has opened the thought, the mark that closes it stands alone.
    """
    found = re.search(CLOSING, answer)
    if found:
        return answer[found.end() :].strip()
    return "" if UNENDED.match(answer) else answer


def find_begun(prompt):
    """The Begun thought at the end of a prompt, or None."""
    found = BEGUN.search(prompt[-300:])  # marks and blanks; a search through the whole of long prompts takes its time
    if not found:
        return None
    mark, blanks, closing, after = found.groups()
    is_open = mark and not closing
    return Begun(found[0], mark, not is_open, blanks + after if is_open else after)


def split_block(turn, thought=""):
    """The Block of a turn that begins with this thought between its marks; None if it does not.

    Without a thought it is an empty one, or the mark alone that closes it. The blanks of an empty thought are shared
    out to both of its marks.
    """
    found = re.match(rf"(\s*(?:{OPENING})?\s*){re.escape(thought)}(\s*(?:{CLOSING})\s*)", turn)
    if not found:
        return None
    opening, closing = found.groups()
    if not thought:
        kept = len(opening) - len(blanks_behind(opening)) // 2
        opening, closing = opening[:kept], opening[kept:] + closing
    return Block(opening, closing, turn[found.end() :])


def write_block(thought, block, begun=None):
    """A turn with this thought in its Block, without what the prompt has Begun of it."""
    if begun is None:
        return block.opening + thought + block.closing + block.rest
    if begun.closed:
        return remove_start(blanks_behind(block.closing), begun.blanks) + block.rest
    return remove_start(blanks_behind(block.opening), begun.blanks) + thought + block.closing + block.rest


def own_block(template, rest, mark=None):
    """The Block in the form of this mark, or of the first one that stands in a template; None if none does."""
    for form in FORMS:
        opening, closing = form.split("{}")
        found = {opening.strip(), closing.strip()}
        if mark in found or (mark is None and any(known in template for known in found)):
            return Block(opening, closing, rest)
    return None


def blanks_behind(text):
    return text[len(text.rstrip()) :]


def remove_start(blanks, written):
    """Blanks without those that are written already."""
    return "" if written.startswith(blanks) else blanks.removeprefix(written)
