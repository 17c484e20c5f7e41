"""The fit of a base model, its tokenizer, the rows and LoRA: what does not go together is found before weights load."""

import re

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from encoding_utils import encode_prompt
from message_utils import UserError, counted, printable, say

LINEAR = (torch.nn.Linear, Conv1D)
# Mamba's fused kernels read these layers' weights themselves, past any adapter (transformers, cuda_kernels_forward)
READ_BY_KERNELS = {"out_proj", "x_proj", "dt_proj"}


# ---- Layers ----------------------------------------------------------------------------------------------------------
def language_model(base):
    """The part of a base model that reads tokens: its decoder, without an output layer, vision or audio towers."""
    decoder = base.get_decoder()
    inner = [child for child in base.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if decoder is base and inner else decoder  # Llama 4's text model gives itself


def own_modules(base):
    """The modules of the language model; a child that holds another model, such as an image encoder, is not its own."""
    text = language_model(base)
    others = [child for child in text.children() if any(isinstance(part, PreTrainedModel) for part in child.modules())]
    return set(text.modules()) - {part for child in others for part in child.modules()}


def left_out(base):
    """Names of the linear layers that take no adapter; the output layer is not among them, as a user may name it.

    They are those of vision and audio towers, which rows of text never reach, routers, which return more than their
    product, and those whose weights kernels read past an adapter.
    """
    own, head, names = own_modules(base), base.get_output_embeddings(), []
    for name, layer in base.named_modules():
        if isinstance(layer, LINEAR) and layer is not head:
            parent = base.get_submodule(name.rpartition(".")[0])
            if layer not in own or read_by_kernels(parent, name) or not returns_product(layer):
                names.append(name)
    return names


def read_by_kernels(parent, name):
    """Whether a layer is one of a Mamba mixer's, which alone hold both A_log and D, that its kernels read."""
    return name.rpartition(".")[2] in READ_BY_KERNELS and {"A_log", "D"} <= parent._parameters.keys()


@torch.no_grad()
def returns_product(layer):
    """Whether a linear layer returns its product alone, tried where its class has a forward of its own."""
    if type(layer).__module__.startswith(("torch.", "bitsandbytes.", "transformers.pytorch_utils")):
        return True
    training, zeros = layer.training, torch.zeros(1, layer.in_features, dtype=layer.weight.dtype)
    found = layer.eval()(zeros.to(layer.weight.device))
    layer.train(training)
    return torch.is_tensor(found)


def is_tied(base):
    """Whether the output layer's weight is that of the input embeddings."""
    head = base.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is base.get_input_embeddings().weight


def check_mergeable(model):
    """Raise UserError for an adapter, of another tool, on an output layer that shares the embeddings' weight."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    if isinstance(head, LoraLayer) and head.get_base_layer().weight is base.get_input_embeddings().weight:
        raise UserError(
            "the adapter changes the output layer, which shares its weight with the input embeddings, so it cannot be"
            " merged; use base and adapter as they are, or train one without that layer"
        )


def listed_names(target_modules):
    return [name.strip() for name in target_modules.split(",")]


def matches(name, targets):
    return any(f".{name}".endswith(f".{target}") for target in targets)


def check_target_modules(base, target_modules):
    """Return the names of the linear layers that an adapter leaves out although LORA_TARGET_MODULES matches them.

    Raises UserError for a listed module that the model has not, since peft would leave it out in silence, and for an
    output layer that could not be merged.
    """
    without = left_out(base)
    names = {name: layer for name, layer in base.named_modules() if isinstance(layer, LINEAR) and name not in without}
    head = base.get_output_embeddings()
    if target_modules == "all-linear":
        if not any(layer is not head for layer in names.values()):
            raise UserError(f"{type(base).__name__} has no linear layer that takes an adapter; give another base model")
        return without
    wanted = listed_names(target_modules)
    tied = [name for name, layer in names.items() if layer is head and is_tied(base)]
    if found := [target for target in wanted if any(matches(name, [target]) for name in tied)]:
        raise UserError(
            f"--lora_target_modules {target_modules}: {', '.join(found)} shares its weight with the input embeddings,"
            " so an adapter of it could not be merged; leave it out"
        )
    if unknown := [target for target in wanted if not any(matches(name, [target]) for name in names)]:
        leaves = sorted({name.split(".")[-1] for name in names if name not in tied})
        raise UserError(
            f"--lora_target_modules {target_modules}: the model has no linear layer {', '.join(unknown)} that takes an"
            f" adapter; it has {', '.join(leaves)}"
        )
    return [name for name in without if matches(name, wanted)]


def say_left_out(shapes):
    """Name what an adapter on all linear layers leaves out: towers, routers, experts that are no linear layers.

    shapes: the model with its adapter. Nothing is said of a plain model.
    """
    base, total = shapes.get_base_model(), sum(parameter.numel() for parameter in shapes.parameters())
    own, names, count = own_modules(base), [], 0
    for name in sorted(shapes.peft_config["default"].exclude_modules or []):
        layer = base.get_submodule(name)
        names.append(short_name(name) if layer in own else ".".join(name.split(".")[:2]))
        count += layer.weight.numel()
    others = stacked_weights(base, own)
    if sum(weight.numel() for weight in others.values()) >= 0.01 * total:
        names += [short_name(name.removesuffix(".weight")) for name in others]
        count += sum(weight.numel() for weight in others.values())
    if names:
        say(
            f"LoRA leaves out {', '.join(dict.fromkeys(names))} ({count / total:.1%} of the parameters): they are not"
            " linear layers of the language model that take an adapter"
        )
    excluded, head = set(shapes.peft_config["default"].exclude_modules or []), base.get_output_embeddings()
    plain = {
        name: layer.weight.numel()
        for name, layer in base.named_modules()
        if isinstance(layer, LINEAR) and layer in own and layer is not head and name not in excluded
        if "base_layer" not in name and "lora_" not in name
    }
    if plain:
        names = ", ".join(dict.fromkeys(map(short_name, plain)))
        say(
            f"LoRA leaves out {names} ({sum(plain.values()) / total:.1%} of the parameters): peft, which adapts this"
            " model's experts, puts no adapter on them"
        )


def stacked_weights(base, own):
    """{name: matrix} of the language model's matrices, such as experts', in no layer that an adapter could serve."""
    usual = (*LINEAR, torch.nn.Embedding, torch.nn.Conv1d)
    modules = {name: module for name, module in base.named_modules() if module in own and not isinstance(module, usual)}
    return {
        f"{name}.{key}": weight
        for name, module in modules.items()
        for key, weight in module.named_parameters(recurse=False)
        if weight.ndim >= 2 and "base_layer" not in f"{name}." and "lora_" not in name
    }


def short_name(name):
    """What comes behind the number of a layer: "model.layers.0.mlp.router" becomes "mlp.router"."""
    return re.split(r"\.\d+\.", name)[-1]


# ---- Tokens ----------------------------------------------------------------------------------------------------------
def count_embeddings(model):
    """How many token ids a model can read and predict."""
    head = model.get_output_embeddings()
    counts = [model.get_input_embeddings().weight.shape[0]] + ([head.weight.shape[0]] if head is not None else [])
    return min(counts)


def check_rows(model, tokenizer, rows, name):
    """Raise UserError for TokenizedRows with a token or a position that the model has not; name: of the rows.

    Rows beyond the positions that a rotary model was made for are announced. It needs no weights of the model.
    """
    if not len(rows):
        return
    count, largest = count_embeddings(model), int(rows.ids.max())
    if largest >= count:
        position = int((rows.ids >= count).argmax())
        row = rows.index["row"][(rows.index["start"] <= position).nonzero()[0][-1]]
        refuse_token(f"{name}, row {row}", tokenizer, int(rows.ids[position]), count)
    check_lengths(model, rows, name)


def check_prompt(model, tokenizer):
    """Raise UserError where the chat template writes nothing, or a token that the model has no embedding for."""
    count, ids = count_embeddings(model), encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}])
    if not ids:
        raise UserError("the chat template writes nothing, expected a question's text; restore the tokenizer's files")
    if max(ids) >= count:
        refuse_token("the chat template", tokenizer, max(ids), count)


def refuse_token(where, tokenizer, number, count):
    token = printable(tokenizer.convert_ids_to_tokens(number))
    raise UserError(
        f"{where}: the token {token} has the id {number}, and the base model has embeddings for the ids 0 to"
        f" {count - 1} only; give the tokenizer that belongs to this model, or the model whose embeddings were resized"
    )


def check_lengths(model, rows, name):
    config, longest = text_config(model), int(rows.index["length"].max())
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not positions or longest <= positions:
        return
    beyond = int((rows.index["length"] > positions).sum())
    found = (
        f"{counted(beyond, 'row')} of the {name} beyond the model's {positions:,} positions, up to {longest:,} tokens"
    )
    if has_position_table(model, positions):
        raise UserError(f"{found}; lower --max_seq_length to {positions}, or give a model with more positions")
    say(f"{found}, which it was not made for and may compute badly; --max_seq_length {positions} cuts them")


def text_config(model):
    return model.config.get_text_config()


def has_position_table(model, positions):
    """Whether a model looks positions up in a table, learned or not; rotary embeddings compute any position.

    OPT's and BioGPT's tables have two more entries. MPT adds a bias of fixed size.
    """
    words = model.get_input_embeddings()
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding) and module != words]
    sizes = {len(table) for table in [*tables, *model.buffers()] if table.ndim == 2}
    return bool(sizes & {positions, positions + 2}) or text_config(model).model_type == "mpt"


def fit_pad_token(tokenizer, model, choose):
    """Replace a pad token that the model has no embedding for, and say so; choose: a function of the usable ids."""
    count = count_embeddings(model)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= count:
        before = tokenizer.pad_token
        tokenizer.pad_token = choose(tokenizer, count)
        say(
            f"The pad token {printable(before)} lies beyond the model's {count:,} embeddings; padding with"
            f" {printable(tokenizer.pad_token)}"
        )
