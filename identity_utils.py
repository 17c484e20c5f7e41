"""What a run and an adapter are made of, as hashes: base model, tokenizer, data, and the settings that matter."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from hub_utils import hub_errors, model_folder
from run_utils import UserError, display_path, read_json, say, write_json

# Settings that a resumed run may change: they shape no weight, or what counts of them is hashed or resolved instead.
# A setting that is not listed here belongs to the identity, so that a new one is refused before it is overlooked.
FREE_SETTINGS = {
    *("base_model_name", "device", "use_fp16", "custom_dataset_path", "validation_dataset_path", "answers_cut_limit"),
    *("gradient_checkpointing", "logging_steps", "save_total_limit", "sample_prompts", "eval_samples"),
    *("max_new_tokens", "do_sample", "temperature", "top_p", "repetition_penalty"),
    *("output_dir", "logs_dir", "models_dir", "run_name"),
}
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
IDENTITY_FILE = "identity.json"  # beside an adapter
BLOCK = 2**20  # token ids that are hashed at once: 4 MiB
SHOWN_DIGITS = 12  # of a hash: enough to tell two apart, short enough for one line


def short_hash(content):
    """The first digits of a text's or bytes' sha256."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:SHOWN_DIGITS]


# ---- Base model and tokenizer ----------------------------------------------------------------------------------------
def base_content(name, models_dir):
    """Hash of a base model's config and of each tensor's name, type, shape and first 4 KiB.

    Under a second for 15 GB. A training moves every weight of a tensor that it touches, so its beginning tells. How the
    tensors are shared out among files does not matter.
    """
    folder = model_folder(name, models_dir)
    with hub_errors(name):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = sorted(tensor for path in weight_files(folder) for tensor in tensor_beginnings(path))
    for incidental in ("transformers_version", "_name_or_path"):
        config.pop(incidental, None)
    return short_hash(json.dumps([config, tensors], sort_keys=True))


def weight_files(folder):
    """The safetensors files that transformers loads from a folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())]
    return [path for path in [folder / "model.safetensors"] if path.is_file()]


def tensor_beginnings(path):
    """Yield [name, type, shape, hash of the first 4 KiB] of each tensor in a safetensors file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is damaged: its header does not fit into the file")
        for name, tensor in json.loads(file.read(length)).items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                file.seek(8 + length + start)
                yield [name, tensor["dtype"], tensor["shape"], short_hash(file.read(min(end - start, 4096)))]


def base_revision(name, models_dir):
    """The commit of a model of the Hub, or the content of a local one."""
    return base_content(name, models_dir) if Path(name).is_dir() else model_folder(name, models_dir).name[:SHOWN_DIGITS]


def tokenizer_content(tokenizer):
    """Hash of the vocabulary, merges, rules and special tokens; padding and truncation are of the moment."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("padding"), backend.pop("truncation")
    return short_hash(json.dumps([backend, tokenizer.eos_token, tokenizer.bos_token], sort_keys=True))


def template_content(tokenizer):
    return short_hash(json.dumps(tokenizer.chat_template, sort_keys=True))


# ---- An adapter ------------------------------------------------------------------------------------------------------
def write_adapter_identity(folder, name, content):
    """Record beside an adapter the base model that it was trained on and the tokenizer files that lie there."""
    write_json(folder / IDENTITY_FILE, {"base_model": f"{name} @ {content}", "files": tokenizer_files(folder)})


def tokenizer_files(folder):
    """{name: hash} of the files that make prompts and answers token ids."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return {name: short_hash((folder / name).read_bytes()) for name in names if (folder / name).is_file()}


def check_adapter_identity(folder, base_name, content):
    """Raise UserError unless base model and tokenizer are those that the adapter was trained with.

    An adapter of another tool has no record: it is loaded with a notice.
    """
    shown = display_path(folder)
    if not (folder / IDENTITY_FILE).is_file():
        say(f"Adapter {shown} has no {IDENTITY_FILE}, so its base model and tokenizer are taken on trust")
        return
    recorded = read_json(folder / IDENTITY_FILE, "the adapter's identity")
    trained_on, old, files = str(recorded.get("base_model")), recorded.get("files"), tokenizer_files(folder)
    old = old if isinstance(old, dict) else {}
    if trained_on.rpartition(" @ ")[2] != content:
        raise UserError(
            f"adapter {shown} does not fit its base model {base_name}: it was trained on {trained_on}, whose weights or"
            f" config are not these ({content}); give that model, or train again"
        )
    if changed := sorted(name for name in old.keys() | files.keys() if old.get(name) != files.get(name)):
        names = ", ".join(changed)
        raise UserError(f"{names} in {shown} changed since the adapter was trained; restore it or train again")


# ---- A run -----------------------------------------------------------------------------------------------------------
def rows_content(rows):
    """How many TokenizedRows there are, and the hash of their ids and labels in their order.

    Neither where they lie in the file nor the dropped rows between them matter.
    """
    starts, lengths = rows.index["start"], rows.index["length"]
    digest = hashlib.sha256(lengths.astype("<i8").tobytes())
    # rows that lie one behind the other are hashed as one, ids first and which of them are trained second
    first = np.flatnonzero(np.diff(starts, prepend=-1) != np.append(0, lengths)[:-1])
    last = np.append(first[1:], len(starts))[: len(first)] - 1
    stretches = [(starts[begin], starts[end] + lengths[end]) for begin, end in zip(first, last, strict=True)]
    for values, kind in ((rows.ids, "<i4"), (rows.is_trained, bool)):
        for start, end in stretches:
            for block in range(start, end, BLOCK):
                digest.update(values[block : min(block + BLOCK, end)].astype(kind).tobytes())
    return f"{len(rows)} rows {digest.hexdigest()[:SHOWN_DIGITS]}"


def run_identity(settings, base, tokenizer, train_rows, validation_rows, arguments, dtype, models_dir):
    """All that the weights of a run depend on, {name: value}; an interrupted run goes on only where it is the same."""
    settled = {name: value for name, value in settings._asdict().items() if name not in FREE_SETTINGS}
    return settled | {
        "base_model": f"{settings.base_model_name} @ {base_revision(base, models_dir)}",
        "tokenizer": tokenizer_content(tokenizer),
        "chat_template": template_content(tokenizer),
        "training_data": rows_content(train_rows),
        "validation_data": rows_content(validation_rows),
        "device": arguments.device.type,
        "number_format": str(dtype).removeprefix("torch."),
        "processes": arguments.world_size,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def differences(old, new):
    """Return ["learning_rate 0.0002 -> 0.001", ...]: what forbids that a run `new` goes on with `old`."""

    def told(identity, name):
        value = identity.get(name)
        return value.rpartition(" @ ")[2] if name == "base_model" and value else value  # a moved folder is the same

    names = sorted((old.keys() | new.keys()) - {"versions"})
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if told(old, name) != told(new, name)]


def version_differences(old, new):
    """The same for the libraries, which may change the last bits of the weights and forbid nothing."""
    old, new = old.get("versions", {}), new["versions"]
    return [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
