"""Talk to the tuned model.

    python inference.py                                        # chat; /help lists the commands
    python inference.py "Explain how photosynthesis works"     # one answer to stdout, then exit
    python inference.py - < letter.txt                         # the same, the whole input being the instruction
    python inference.py --input_file prompts.jsonl --output_file answers.jsonl    # a file of them; goes on if killed
    python inference.py --demo                                 # predefined examples
    python inference.py --base_only                            # the base model, without the adapter

Replies go to stdout, everything else to stderr.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until run_script: Ctrl-C in the imports below leaves no traceback

import contextlib
import os
import sys
from collections import namedtuple
from pathlib import Path

from file_utils import check_writable, display_path, expand_home, read_json_if_any
from message_utils import UserError, quiet_libraries, say
from row_utils import require_text
from run_utils import CACHE, find_adapter
from script_utils import LateImport, run_script, start_garbage_collection
from settings_utils import build_parser, make_settings, parse_command_line

# These rooms import torch or other libraries, which takes seconds: --help and a mistyped flag are answered before.
batch_utils = LateImport("batch_utils")
chat_utils = LateImport("chat_utils")
fit_utils = LateImport("fit_utils")
hub_utils = LateImport("hub_utils")
model_utils = LateImport("model_utils")
prompt_utils = LateImport("prompt_utils")
terminal_utils = LateImport("terminal_utils")
torch = LateImport("torch")

Loaded = namedtuple("Loaded", "model tokenizer settings")  # what the phase of loading hands on

DEMO_PROMPTS = (
    "Explain how photosynthesis works",
    "How do I repair a flat tyre?",
    "What are your opening hours?",
    "Write a short thank-you note to a friend.",
    "My order has not arrived yet. What should I do?",
)
CHAT_INPUTS = "chat-inputs"  # in OUTPUT_DIR: what was typed in chats
SEVERAL_TURNS = 0.1  # share of an adapter's rows with several questions from which a chat keeps the earlier turns


def main(argv):
    parser = build_parser("inference.py", __doc__)
    parser.add_argument("instruction", nargs="?", help="answer this once and exit; -: what comes from stdin")
    parser.add_argument("--demo", action="store_true", help="answer the predefined examples and exit")
    parser.add_argument("--base_only", action="store_true", help="talk to the base model, without the adapter")
    parser.add_argument("--adapter_path", help="adapter to talk to (default: OUTPUT_DIR/lora-adapter)")
    parser.add_argument("--input_file", help="answer all rows of this file: any format and shape that training reads")
    parser.add_argument("--output_file", help="where the answers of --input_file are written, a .jsonl file")
    options, given = parse_command_line(parser, argv)
    quiet_libraries()
    if sys.stdout is None and options.output_file is None:
        raise UserError("stdout is closed, so no answer could be seen; open it, or write to a file by --output_file")
    adapter_path, output_dir = find_adapter(options, given)
    instruction = find_instruction(options.instruction, options.demo)
    target = find_output_file(options)
    talks = target is None and instruction is None and not options.demo
    with terminal_utils.unseen_typing() if talks else contextlib.nullcontext():
        settings = read_settings(adapter_path, given, options.base_only)
        if target is not None:  # a mistake in the file is told before a model is loaded
            rows = batch_utils.read_prompts(options.input_file, settings.dataset_columns, output_dir / CACHE)
        loaded = load(adapter_path, settings, options.base_only)
    start_garbage_collection()
    torch.manual_seed(settings.seed)
    adapter_path = None if options.base_only else adapter_path
    if target is not None:
        batch_utils.answer_file(*loaded, adapter_path, rows, target)
    elif instruction is not None:
        print_reply(loaded, instruction)
    elif options.demo:
        run_demo(loaded)
    else:
        chat(loaded, adapter_path, output_dir)


def find_instruction(text, demo=False):
    """The instruction of the command line, or stdin's whole text for "-"; UserError if it is blank or no text."""
    if text is not None and demo:
        raise UserError("--demo answers its own examples; leave it out, or the instruction")
    dashed = text == "-"
    if dashed:
        text = read_stdin()
    elif text is not None:
        with contextlib.suppress(UnicodeEncodeError):  # half a surrogate pair, of which require_text tells
            text = decode(os.fsencode(text))  # it is UTF-8, though the locale says ASCII
    if text is not None and not require_text(text, "the instruction").strip():
        found = "the input is empty, expected an instruction" if dashed else "the instruction is empty"
        raise UserError(f'{found}; give one in quotes, such as "Explain how photosynthesis works"')
    return text


def decode(given):
    try:
        return given.decode()
    except UnicodeDecodeError:
        raise UserError(
            "the instruction is not UTF-8 text; save it as UTF-8, and give it by: python inference.py - < FILE"
        ) from None


def read_stdin():
    """All of stdin, without the line break at its end."""
    if sys.stdin is None:
        raise UserError('there is no input to read; give an instruction in quotes, such as "Hello"')
    try:
        return sys.stdin.read().removeprefix("\ufeff").rstrip("\n")
    except UnicodeDecodeError:
        raise UserError("the input is not UTF-8 text; save it as UTF-8 and try again") from None


def find_output_file(options):
    """The path of --output_file, or None without --input_file; nothing may lie there yet."""
    if options.input_file is None and options.output_file is None:
        return None
    if options.input_file is None or options.output_file is None:
        raise UserError("--input_file and --output_file belong together; give both")
    if options.instruction is not None or options.demo:
        raise UserError("--input_file is answered alone; leave out the instruction or --demo")
    if not options.output_file.endswith(".jsonl"):
        raise UserError(f"--output_file {options.output_file}: answers are JSON Lines; give a name that ends in .jsonl")
    target = Path(expand_home(options.output_file)).absolute()
    if target.exists():
        raise UserError(f"{display_path(target)} exists already; move it away, or give another --output_file")
    check_writable(target.parent, "--output_file")
    return target


def read_settings(adapter_path, given, base_only):
    """The settings of an adapter, and those given; with base_only it need not exist, and names the base if it does."""
    recorded = {} if base_only and not adapter_path.is_dir() else model_utils.read_recorded_settings(adapter_path)
    return make_settings(given, recorded, "inference.py")


def load(adapter_path, settings, base_only):
    """Load the model to talk to: the adapter on its base model, or the base model alone."""
    if not base_only:
        return Loaded(*model_utils.load_trained_model(adapter_path, settings), settings)
    say(f"Base model: {settings.base_model_name}, no adapter")
    model = model_utils.load_settings_base(settings)
    models_dir = hub_utils.models_cache(settings.models_dir, settings.base_model_name)
    tokenizer = model_utils.load_tokenizer(model.name_or_path, models_dir)
    fit_utils.fit_pad_token(tokenizer, model, model_utils.choose_pad_token)
    fit_utils.check_prompt(model, tokenizer)
    prompt_utils.announce_system_text(tokenizer, settings.system_prompt)
    return Loaded(model, tokenizer, settings)


# ---- One answer, the examples, the chat ------------------------------------------------------------------------------
def print_reply(loaded, instruction):
    """Stream the answer to an instruction to stdout."""
    model, tokenizer, settings = loaded
    messages = prompt_utils.begin_with(settings.system_prompt, [{"role": "user", "content": instruction}])
    chat_utils.print_answer(model, tokenizer, messages, settings)


def run_demo(loaded):
    for prompt in DEMO_PROMPTS:
        print(f"\nYou:   {prompt}\nModel: ", end="", flush=True)
        print_reply(loaded, prompt)


def chat(loaded, adapter_path, output_dir):
    """Talk until /exit or the end of the input; adapter_path is None for the base model alone."""
    if sys.stdin is None:
        raise UserError('there is no input to read; give an instruction in quotes, such as "Hello"')
    keeps_turns = knows_turns(loaded.tokenizer, adapter_path)
    kept = "Earlier turns are kept." if keeps_turns else "Each question stands alone; /history keeps earlier turns."
    terminal_utils.note(f"Type a question; /help lists the commands.\n{kept}", dim=False)
    chat_utils.Chat(*loaded, keeps_turns=keeps_turns, history_file=output_dir / CHAT_INPUTS).run()


def knows_turns(tokenizer, adapter_path):
    """Whether a model has learned conversations of several turns.

    A chat template of its own says so. Ours is given to base models, which know them only if the adapter's rows had
    some, as its run recorded.
    """
    if tokenizer.chat_template != prompt_utils.ALPACA_TEMPLATE:
        return True
    if adapter_path is None:
        return False
    share = read_json_if_any(adapter_path / "run.json", "the adapter's record").get("several_turns")
    return isinstance(share, (int, float)) and share >= SEVERAL_TURNS


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
