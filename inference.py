"""Talk to the tuned model.

    python inference.py                                        # chat; /help lists the commands
    python inference.py "Explain how photosynthesis works"     # one answer to stdout, then exit
    python inference.py --demo                                 # predefined examples
    python inference.py --base_only                            # the base model, without the adapter

Replies go to stdout, everything else to stderr.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until run_script: Ctrl-C in the imports below leaves no traceback

import sys
from collections import namedtuple
from contextlib import closing, suppress

from message_utils import LateImport, UserError, quiet_libraries, run_script, say, start_garbage_collection
from run_utils import find_adapter
from settings_utils import build_parser, make_settings, parse_command_line

# These rooms import torch or other libraries, which takes seconds: --help and a mistyped flag are answered before.
data_utils = LateImport("data_utils")
fit_utils = LateImport("fit_utils")
generation_utils = LateImport("generation_utils")
hub_utils = LateImport("hub_utils")
model_utils = LateImport("model_utils")
prompt_utils = LateImport("prompt_utils")
torch = LateImport("torch")

Loaded = namedtuple("Loaded", "model tokenizer settings")  # what the phase of loading hands on

DEMO_PROMPTS = (
    "Explain how photosynthesis works",
    "How do I repair a flat tyre?",
    "What are your opening hours?",
    "Write a short thank-you note to a friend.",
    "My order has not arrived yet. What should I do?",
)
HELP = """/help     this list
/clear    forget the conversation
/history  remember earlier turns, or stop doing so
/quit     leave (also Ctrl-D); Ctrl-C stops an answer"""


def main(argv):
    parser = build_parser("inference.py", __doc__)
    parser.add_argument("instruction", nargs="?", help="answer this once and exit")
    parser.add_argument("--demo", action="store_true", help="answer the predefined examples and exit")
    parser.add_argument("--base_only", action="store_true", help="talk to the base model, without the adapter")
    parser.add_argument("--adapter_path", help="adapter to talk to (default: OUTPUT_DIR/lora-adapter)")
    options, given = parse_command_line(parser, argv)
    if options.instruction is not None:
        check_instruction(options.instruction)
    quiet_libraries()
    adapter_path, _ = find_adapter(options, given)
    loaded = load(adapter_path, given, options.base_only)
    start_garbage_collection()
    torch.manual_seed(loaded.settings.seed)
    if options.instruction is not None:
        print_reply(loaded, [{"role": "user", "content": options.instruction}])
    elif options.demo:
        run_demo(loaded)
    else:
        chat(loaded)


def check_instruction(text):
    """Raise UserError for an instruction that is blank or no text (bytes that are not UTF-8)."""
    if not data_utils.require_text(text, "the instruction").strip():
        raise UserError('the instruction is empty; give one in quotes, such as "Explain how photosynthesis works"')


def load(adapter_path, given, base_only):
    """Load the model to talk to; with base_only the adapter need not exist, and names the base where it does."""
    if not base_only:
        settings = make_settings(given, model_utils.read_recorded_settings(adapter_path), "inference.py")
        return Loaded(*model_utils.load_trained_model(adapter_path, settings), settings)
    recorded = model_utils.read_recorded_settings(adapter_path) if adapter_path.is_dir() else {}
    settings = make_settings(given, recorded, "inference.py")
    say(f"Base model: {settings.base_model_name}, no adapter")
    model = model_utils.load_settings_base(settings)
    tokenizer = model_utils.load_tokenizer(model.name_or_path, hub_utils.models_cache(settings.models_dir))
    fit_utils.fit_pad_token(tokenizer, model, model_utils.choose_pad_token)
    fit_utils.check_prompt(model, tokenizer)
    prompt_utils.announce_system_text(tokenizer, settings.system_prompt)
    return Loaded(model, tokenizer, settings)


def print_reply(loaded, messages):
    """Stream one reply to stdout and return it; Ctrl-C ends the reply, not the program."""
    model, tokenizer, settings = loaded
    generation = generation_utils.build_generation_config(tokenizer, settings)
    messages = prompt_utils.begin_with(settings.system_prompt, messages)
    chunks = []
    with closing(generation_utils.stream_reply(model, tokenizer, messages, generation)) as stream:
        try:
            for chunk in stream:
                chunk = chunk if chunks else chunk.lstrip()
                if chunk:
                    chunks.append(chunk)
                    print(chunk, end="", flush=True)
        except KeyboardInterrupt:
            say(" [stopped]")
    print(flush=True)
    return "".join(chunks).strip()


def run_demo(loaded):
    for prompt in DEMO_PROMPTS:
        print(f"\nYou:   {prompt}\nModel: ", end="", flush=True)
        print_reply(loaded, [{"role": "user", "content": prompt}])


def chat(loaded, answer=print_reply):
    """Read, answer, repeat, until /quit or the end of the input.

    Earlier turns are remembered where the tokenizer came with a chat template of its own; our Alpaca template is mostly
    trained on single turns, so there it is off until /history.
    """
    messages, keep_history = [], loaded.tokenizer.chat_template != prompt_utils.ALPACA_TEMPLATE
    if sys.stdin is None:
        raise UserError('there is no input to read; give an instruction in quotes, such as "Hello"')
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 must not end the chat
    with suppress(ImportError):
        import readline  # noqa: F401  only a chat wants the arrow keys that it gives to input(); Windows has its own
    interactive = sys.stdin.isatty()
    say(f"Type an instruction; /help lists the commands. Earlier turns are {'kept' if keep_history else 'not kept'}.")
    while True:
        try:
            text = input("\nYou:   " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/help":
            say(HELP)
        elif text == "/clear":
            messages = []
            say("The conversation is forgotten.")
        elif text == "/history":
            messages, keep_history = [], not keep_history
            say(f"Earlier turns are {'kept' if keep_history else 'not kept'} from now on.")
        elif text.startswith("/"):
            say(f"Unknown command {text.split()[0]}; /help lists the commands")
        elif text:
            earlier = messages if keep_history else []
            messages = [*earlier, {"role": "user", "content": text}]
            if interactive:
                print("Model: ", end="", flush=True)
            reply = answer(loaded, messages)
            # a template refuses two questions in a row, so one that was stopped before any answer is forgotten
            messages = [*messages, {"role": "assistant", "content": reply}] if reply else earlier


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
