"""Tokenizer, base model, quantization and LoRA: load, train-ready, save and merge.

    from model_utils import load_trained_model, merge_and_save_model
    model, tokenizer = load_trained_model("output/lora-adapter")
    merge_and_save_model(model, tokenizer, "output/merged-model")

What cannot be loaded is a UserError with its remedy.
"""

import contextlib
import copy
import gc
import json
import math
import os
import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from transformers.pytorch_utils import Conv1D

from engine_shards import is_sharded, quantizing_on, shard
from evidence_utils import SEEN_ROWS, write_seen_rows
from export_utils import write_adapter_card
from file_utils import (
    SHOWN_DIGITS,
    check_space,
    display_path,
    make_readable,
    read_json,
    read_json_if_any,
    resolve_path,
    short_hash,
    staged_folder,
    storage_errors,
    write_json,
)
from fit_utils import check_mergeable, check_prompt, check_target_modules, fit_pad_token, listed_names, say_left_out
from hub_utils import download_weights, hub_errors, locate_model, model_folder, models_cache, weight_files
from message_utils import UserError, counted, quiet_libraries, say, say_once
from progress_utils import progress
from prompt_utils import (
    ALPACA_TEMPLATE,
    announce_system_text,
    end_token_ids,
    has_thinking_default,
    set_thinking,
)
from run_utils import MERGE_RECORD, RUN_RECORD, TRAINER_STATE
from settings_utils import DEFAULTS, make_settings, settings_of_record

try:
    import resource
except ImportError:  # Windows has no such figure in its standard library
    resource = None

ADAPTER_WEIGHTS = "adapter_model.safetensors"
SETTINGS_FILE = "settings.json"
IDENTITY_FILE, ADAPTER_CONFIG = "identity.json", "adapter_config.json"  # beside an adapter
GIB, CPU = 2**30, torch.device("cpu")
# A base's config.json may name kernels for attention and experts, such as one that is downloaded from the Hub. Given in
# the call beside the config they are the library's own choice for this model and machine, whatever that file says.
OWN_KERNELS = {"attn_implementation": None, "experts_implementation": None}
PROBE_TEXT = "### Instruction:\nWhat does a good answer look like?\n\n### Response:\nIt is short, clear and true."


# ---- Devices and number formats --------------------------------------------------------------------------------------
def resolve_device(device):
    """Return the torch.device to run on: "cuda" falls back to MPS or the CPU, and says so; "cpu" forces the CPU.

    Under accelerate or torchrun each process takes the GPU of its local rank; accelerate launch --cpu forces the CPU.
    """
    if device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", local_gpu())
    fallback = "mps" if torch.backends.mps.is_available() else "cpu"
    say_once(f"Running on {fallback.upper()}: no CUDA GPU found")
    return torch.device(fallback)


def local_gpu():
    """The number of this process's GPU; a UserError where a launcher started more processes than there are GPUs."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"{processes} processes were started on this machine and {counted(gpus, 'GPU')} can be used, expected one"
            f" for each; give accelerate launch --num_processes {gpus} (of all machines together), or look at"
            " CUDA_VISIBLE_DEVICES and gpu_ids"
        )
    return int(os.environ.get("LOCAL_RANK", "0"))


def choose_dtype(device, use_fp16):
    """On CUDA bfloat16 where the GPU computes in it (Ampere and newer), else float16; float32 on other devices."""
    if not use_fp16 or device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def grow_gpu_memory(device):
    """Have PyTorch grow its blocks of memory on a CUDA GPU in place, which leaves fewer gaps; nothing is allocated yet.

    Left alone are WSL and Arm machines, where it fails late, drivers of virtual GPUs, which refuse the first block, and
    what the user has set.
    """
    given = os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    system = platform.uname()
    usual = (system.system, system.machine) == ("Linux", "x86_64") and "microsoft" not in system.release.lower()
    if device.type != "cuda" or given or not usual:
        return
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


def measured_peak(device):
    """Peak memory of this process in GiB: reserved by PyTorch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


# ---- Tokenizer -------------------------------------------------------------------------------------------------------
def load_tokenizer(path, models_dir=None):
    """Load a tokenizer ready for training: a pad token other than EOS, a chat template, padding on the right."""
    check_sentencepiece(path)
    with hub_errors(path, "restore the folder's files or give another one"):
        # mistral_format: a tekken.json beside tokenizer.json would be read by mistral-common, which gives no offsets
        tokenizer = AutoTokenizer.from_pretrained(
            path, cache_dir=models_dir, trust_remote_code=False, mistral_format=False
        )
    if not tokenizer.is_fast:
        raise UserError(f"{path} has only a slow tokenizer, without character offsets; choose another base model")
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {path} has no end-of-text token; choose another base model")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.pad_token = choose_pad_token(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = ALPACA_TEMPLATE
    if not has_thinking_default(tokenizer):
        set_thinking(tokenizer, False)
    return tokenizer


def check_sentencepiece(path):
    """Raise UserError for a folder with tokenizer.model alone where the library that reads it is not installed."""
    files = {name: (Path(path) / name).is_file() for name in ("tokenizer.model", "tokenizer.json")}
    if files["tokenizer.model"] and not files["tokenizer.json"] and find_spec("sentencepiece") is None:
        raise UserError(
            f"{path} has a tokenizer.model and no tokenizer.json; pip install sentencepiece, which reads it, or put the"
            " model's tokenizer.json beside it"
        )


def has_tokenizer(folder):
    """Whether a folder holds a tokenizer; adapters of other tools often do not."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return any((Path(folder) / name).is_file() for name in names)


def choose_pad_token(tokenizer, embeddings=2**31):
    """An existing token to pad with: a new one would resize the embeddings, EOS would be masked by other tools.

    Its id is below the number of the model's embeddings.
    """
    added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if number < embeddings}
    special = [token.content for token in added.values() if token.special]
    spare = [token for token in special if "pad" in token or "reserved" in token or "unused" in token]
    # the last resort is harmless here: labels and masks of this project go by position, never by token
    candidates = [token for token in (tokenizer.unk_token, *spare) if token not in (None, tokenizer.eos_token)]
    return next(iter(candidates), tokenizer.eos_token)


# ---- Base model and LoRA ---------------------------------------------------------------------------------------------
class Base(NamedTuple):
    """A base model as the settings name it, before its weights are loaded."""

    path: str  # a local folder, or a Hub id
    models_dir: Path
    device: torch.device
    dtype: torch.dtype  # of what is not quantized
    tokenizer: object
    shapes: object  # the model with its adapter, on the device meta: without memory for its weights
    content: str | None = None  # base_content, known once the weights are there
    shards: object = None  # the ShardEngine that is to share the weights out over the processes, or None


def find_base(settings):
    """Find the base model and prepare the device for it; returns a Base."""
    models_dir = models_cache(settings.models_dir, settings.base_model_name)
    device = resolve_device(settings.device)
    grow_gpu_memory(device)
    dtype = choose_dtype(device, settings.use_fp16)
    path = locate_model(settings.base_model_name, models_dir)
    tokenizer, shapes = load_tokenizer(path, models_dir), empty_model(path, settings, models_dir)
    fit_pad_token(tokenizer, shapes, choose_pad_token)
    if settings.lora_target_modules == "all-linear":
        say_left_out(shapes)
    return Base(path, models_dir, device, dtype, tokenizer, shapes)


def load_for_training(settings, base):
    """Load the weights of a Base and attach a fresh adapter; returns the model, and the Base with its content."""
    quantization = build_quantization_config(settings, base.dtype, sharded=base.shards is not None)
    if base.shards:
        with quantizing_on(base.device):
            model = load_base_model(base.path, base.device, base.dtype, quantization, base.models_dir, CPU)
    else:
        model = load_base_model(base.path, base.device, base.dtype, quantization, base.models_dir)
    share_token_ids(model, base.tokenizer)
    if base.shards:
        model = shard(model, base.shards, base.device, lambda model: attach_lora(model, settings))
    else:
        model = attach_lora(model, settings)
    return model, base._replace(content=base_content(base.path, base.models_dir))


def build_quantization_config(settings, dtype, sharded=False):
    """QLoRA's 4-bit NF4 with double quantization (Dettmers et al. 2023), computing in dtype; None if switched off.

    sharded: the packed weights are stored as numbers of dtype, as FSDP2 and DeepSpeed share out, and not as bytes.
    """
    if not settings.use_4bit_quantization:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
    )


def load_base_model(path, device, dtype, quantization_config=None, models_dir=None, place=None):
    """Load a causal LM in eval mode onto one device; a 4-bit model on a CPU works, slowly, and is announced.

    place: where its weights are to lie meanwhile, if they are brought to the device later.
    """
    if quantization_config is not None and device.type == "cpu":
        say("4-bit on a CPU works, but much slower than on a GPU; --use_4bit_quantization false is faster here")
    if quantization_config is not None and device.type == "mps":
        raise UserError("4-bit quantization needs CUDA or the CPU; add --use_4bit_quantization false or --device cpu")
    if not Path(path).is_dir():
        download_weights(path, models_dir)
    with hub_errors(path), progress(f"Loading {path}"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            config=AutoConfig.from_pretrained(path, cache_dir=models_dir, trust_remote_code=False),
            dtype=dtype,
            quantization_config=quantization_config,
            device_map={"": place or device},
            cache_dir=models_dir,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **OWN_KERNELS,
        )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{path} lacks {len(missing)} of the model's weights, such as {missing[0]}, which would be random; give a"
            " complete causal language model"
        )
    if device.type == "cpu":
        keep_four_bits_trainable(model)
    return model.eval()


def keep_four_bits_trainable(model):
    """Keep bitsandbytes from packing 4-bit layers anew at their first pass in eval mode on CPUs with AVX512-BF16.

    It packs for inference and never back, and through the packed layers no gradient flows (bitsandbytes 0.50,
    Linear4bit.forward), so that a training after an evaluation would learn next to nothing, in silence.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_settings_base(settings):
    """Load the base model that the settings name, as they say: device, number format and quantization."""
    models_dir = models_cache(settings.models_dir, settings.base_model_name)
    path = locate_model(settings.base_model_name, models_dir)
    device = resolve_device(settings.device)
    dtype = choose_dtype(device, settings.use_fp16)
    return load_base_model(path, device, dtype, build_quantization_config(settings, dtype), models_dir)


def share_token_ids(model, tokenizer):
    """Tell the model's configs the tokenizer's pad id, as the Trainer would, with a notice, at its start."""
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def build_lora_config(settings, left_out=()):
    """LORA_TARGET_MODULES as peft has it; left_out: names of the layers among them that get no adapter."""
    modules = settings.lora_target_modules
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=modules if modules == "all-linear" else listed_names(modules),
        exclude_modules=list(left_out) or None,
        task_type="CAUSAL_LM",
    )


def attach_lora(model, settings):
    """Freeze the base and add fresh adapters, whose first weights are fixed by the seed.

    peft keeps the LoRA weights in float32 for the optimizer. Nothing else is cast: prepare_model_for_kbit_training
    would turn every 16-bit weight of the base to float32, about 1 GiB on 7B.
    """
    left_out = check_target_modules(model, settings.lora_target_modules)
    config = build_lora_config(settings, left_out)
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's weights lie so
    set_seed(settings.seed)
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        if "ParamWrapper" not in str(error):
            raise
        raise UserError(
            "an adapter of this model's experts takes neither dropout nor DoRA; add --lora_dropout 0 --use_dora false,"
            " or name other layers: --lora_target_modules q_proj,v_proj"
        ) from error
    # as the user gave it, not as it was resolved: a path inside the project stays valid when the project moves
    peft_model.peft_config["default"].base_model_name_or_path = settings.base_model_name
    return peft_model


def empty_model(path, settings, models_dir=None):
    """The model with its adapter, without memory for its weights: shapes only, from its config."""
    with hub_errors(path):
        model_config = AutoConfig.from_pretrained(path, cache_dir=models_dir, trust_remote_code=False)
        if getattr(model_config, "quantization_config", None) is not None:
            raise UserError(
                f"{path} is stored quantized, and an adapter could not be merged into it; give the model that it was"
                " made from, which is quantized to 4 bits while it is loaded"
            )
        with torch.device("meta"):
            return attach_lora(AutoModelForCausalLM.from_config(model_config, **OWN_KERNELS), settings)


def count_parameters(model):
    """(all, trainable) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


# ---- What a base model and a tokenizer are, as hashes ----------------------------------------------------------------
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


def weights_at_hand(folder):
    """Whether all safetensors files that transformers would load from a folder lie there."""
    paths = weight_files(folder)
    return bool(paths) and all(path.is_file() for path in paths)


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


# ---- Saved adapters --------------------------------------------------------------------------------------------------
def save_adapter(model, tokenizer, path, content=None, seen=None):
    """Write the adapter, and the tokenizer with its chat template, as safetensors and JSON only.

    content: the base's base_content, which the adapter records; None: nothing is recorded. seen: the SeenRows of its
    run, or None.
    """
    # one process alone must not touch weights that all share out, and what is trained is all that is saved
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    # False: "auto" would ask the Hub whether the embeddings were resized, and they never are
    model.save_pretrained(path, state_dict=trained if is_sharded(model) else None, save_embedding_layers=False)
    tokenizer.save_pretrained(path)
    if seen is not None:
        write_seen_rows(path, seen)
    if content:
        write_adapter_identity(Path(path), model.peft_config["default"].base_model_name_or_path, content)
    make_readable(path)


def save_finished_adapter(model, base, path, settings, record, state, seen=None):
    """Save an adapter with its settings, run record and model card; the folder appears only when it is complete.

    base: the Base that it was trained on. state: the TrainerState, whose log_history has the losses of all steps.
    seen: the SeenRows of its run.
    """
    state.best_model_checkpoint = None  # it is an absolute path, and best_global_step says the same
    with staged_folder(path) as staged:
        save_adapter(model, base.tokenizer, staged, base.content, seen)
        write_recorded_settings(staged, settings)
        write_json(staged / RUN_RECORD, record)
        state.save_to_json(staged / TRAINER_STATE)
        write_adapter_card(staged, base.tokenizer, settings.base_model_name, settings, record)


def write_adapter_identity(folder, name, content):
    """Record beside an adapter the base model that it was trained on and the files of its own that lie there."""
    write_json(folder / IDENTITY_FILE, {"base_model": f"{name} @ {content}", "files": recorded_files(folder)})


def recorded_files(folder):
    """{name: hash} of an adapter's files: its weights, all that makes texts token ids, the digests of rows it has seen.

    Of its config the name of the base does not count, which a user may have to correct.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja")
    names = (ADAPTER_WEIGHTS, *names, SEEN_ROWS)
    paths = [path for name in names for path in sorted(folder.glob(name)) if path.is_file()]
    hashes = {path.relative_to(folder).as_posix(): short_hash(path) for path in paths}
    config = read_json(folder / ADAPTER_CONFIG, "the adapter's configuration")
    config.pop("base_model_name_or_path", None)
    return hashes | {ADAPTER_CONFIG: short_hash(json.dumps(config, sort_keys=True))}


def check_adapter_identity(folder, base_name, content):
    """Raise UserError unless base model and tokenizer are those that the adapter was trained with.

    An adapter of another tool has no record: it is loaded with a notice.
    """
    shown = display_path(folder)
    if not os.path.lexists(folder / IDENTITY_FILE):
        say(f"Adapter {shown} has no {IDENTITY_FILE}, so its base model and tokenizer are taken on trust")
        return
    recorded = read_json(folder / IDENTITY_FILE, "the adapter's identity")
    trained_on, old, files = str(recorded.get("base_model")), recorded.get("files"), recorded_files(folder)
    old = old if isinstance(old, dict) else {}
    if SEEN_ROWS not in files:  # who gives an adapter away may keep them
        old.pop(SEEN_ROWS, None)
    for name in {ADAPTER_WEIGHTS, ADAPTER_CONFIG} - old.keys():  # earlier versions recorded neither
        del files[name]
    if trained_on.rpartition(" @ ")[2] != content:
        raise UserError(
            f"adapter {shown} does not fit its base model {base_name}: it was trained on {trained_on}, whose weights or"
            f" config are not these ({content}); give that model, or train again"
        )
    if changed := sorted(name for name in old.keys() | files.keys() if old.get(name) != files.get(name)):
        names = ", ".join(changed)
        raise UserError(f"{names} in {shown} changed since the adapter was trained; restore it or train again")


def check_adapter_folder(path):
    """Return the folder's resolved path, or raise UserError unless it holds an adapter's config and weights."""
    folder = resolve_path(path)
    if folder.is_file():
        raise UserError(f"{path} is a file, expected an adapter's folder; give the folder that holds it")
    if not folder.is_dir():
        raise UserError(f"adapter folder {path} does not exist; train one first with python train.py")
    if is_merged(folder):
        raise UserError(
            f"{path} holds a merged model and no adapter; python inference.py --base_only --base_model_name {path}"
            " talks to it, and python evaluate.py --adapter_path measures it"
        )
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"adapter folder {path} holds no {name}; train again, or give the folder that holds it")
    return folder


def read_recorded_settings(adapter_path):
    """The settings that an adapter was trained with, as {name: value}; the base model is the adapter's own."""
    folder = check_adapter_folder(adapter_path)
    recorded = read_json_if_any(folder / SETTINGS_FILE, "the adapter's settings")
    adapter_config = read_json(folder / ADAPTER_CONFIG, "the adapter's configuration")
    base = adapter_config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{adapter_path}/adapter_config.json names no base model; train again or restore the file")
    if adapter_config.get("peft_type") != "LORA":
        raise UserError(f"{adapter_path}/adapter_config.json describes no LoRA adapter; give the folder of one")
    return recorded | {"base_model_name": base}


def read_training(folder):
    """(the settings that an adapter was trained with, what run.json holds of its run); None and {} where unknown."""
    files = [Path(folder) / SETTINGS_FILE, Path(folder) / RUN_RECORD]
    recorded, record = (read_json_if_any(file, "the adapter's record") for file in files)
    return settings_of_record(recorded) if DEFAULTS.keys() & recorded else None, record


def write_recorded_settings(adapter_path, settings):
    write_json(Path(adapter_path) / SETTINGS_FILE, settings._asdict())


def load_trained_model(adapter_path, settings=None):
    """Load an adapter onto its base model, as it was trained: returns (model, tokenizer), the model in eval mode.

    The settings are the adapter's own unless others are passed. Raises UserError if the folder, the weights or the
    base model are missing or do not fit each other.
    """
    quiet_libraries()
    recorded = read_recorded_settings(adapter_path)
    folder = resolve_path(adapter_path)
    settings = settings or make_settings(recorded=recorded, script=None)
    if settings.base_model_name != recorded["base_model_name"]:
        raise UserError(
            f"adapter {display_path(folder)} was trained on {recorded['base_model_name']} and cannot be used on"
            f" {settings.base_model_name}; leave out --base_model_name (if the base was moved, correct"
            " base_model_name_or_path in the adapter's adapter_config.json)"
        )
    tokenizer = load_adapters_tokenizer(folder, settings)
    say(f"Base model: {settings.base_model_name}, adapter: {display_path(folder)}")
    base = load_settings_base(settings)
    fit_pad_token(tokenizer, base, choose_pad_token)
    check_prompt(base, tokenizer)
    content = base_content(base.name_or_path, models_cache(settings.models_dir, settings.base_model_name))
    check_adapter_identity(folder, settings.base_model_name, content)
    announce_system_text(tokenizer, settings.system_prompt)
    return load_adapter(base, folder).eval(), tokenizer


def load_adapters_tokenizer(folder, settings):
    """The tokenizer that lies beside an adapter, or its base model's where another tool saved none.

    An adapter of this project, known by its recorded settings, came with one, which is then missed.
    """
    if has_tokenizer(folder) or (folder / SETTINGS_FILE).is_file():
        return load_tokenizer(str(folder))
    models_dir = models_cache(settings.models_dir, settings.base_model_name)
    tokenizer = load_tokenizer(locate_model(settings.base_model_name, models_dir), models_dir)
    say(f"Adapter {display_path(folder)} holds no tokenizer; its base model's is used, with that one's chat template")
    return tokenizer


def load_adapter(base, folder):
    """Put a saved adapter on a base model; every weight must be there and fit, else UserError."""
    name = display_path(folder)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
            poisoned = [key for key in sorted(saved) if not torch.isfinite(file.get_tensor(key)).all()]
        model = PeftModel.from_pretrained(base, folder)
    except SafetensorError as error:
        raise UserError(f"{name}/{ADAPTER_WEIGHTS} is damaged ({error}); train again or restore it") from error
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"adapter {name} does not fit its base model {base.name_or_path}: its adapter_config.json was changed, or"
            " it was trained on another one"
        ) from error
    if poisoned:
        raise UserError(
            f"{name}/{ADAPTER_WEIGHTS} holds weights that are not finite, such as {poisoned[0]}; train again"
        )
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if saved != expected:
        raise UserError(
            f"adapter {name} does not fit its base model {base.name_or_path}:"
            f" {counted(len(expected - saved), 'weight')} missing and {len(saved - expected):,} unknown; it was"
            " trained on another one"
        )
    return model


# ---- Merging ---------------------------------------------------------------------------------------------------------
FULL, DEQUANTIZED = "full", "dequantized"  # bases to merge into: as stored; or its 4-bit weights, dequantized
TOLERANCE = 0.02  # share by which a merged model's loss may differ; rounding to 16 bits makes about a tenth of it


def is_merged(folder):
    """Whether a folder holds a merged model that merge.py wrote."""
    return (folder / MERGE_RECORD).is_file() and not (folder / "adapter_config.json").is_file()


def read_settings(path):
    """As read_recorded_settings, of an adapter or of a merged model, whose base model is the one it was merged into."""
    folder = resolve_path(path)
    if not is_merged(folder):
        return read_recorded_settings(path)
    base = read_json(folder / MERGE_RECORD, "the record of the merge").get("base_model")
    if not isinstance(base, str) or not base:
        raise UserError(f"{display_path(folder / MERGE_RECORD)} names no base model; merge again or restore the file")
    recorded = read_json_if_any(folder / SETTINGS_FILE, "the settings of the training")
    return recorded | {"base_model_name": base, "use_4bit_quantization": False}


def tuned_and_base(path, settings):
    """Yield ("tuned", model, tokenizer) of an adapter or a merged model, then ("base", model, tokenizer) of its base.

    With an adapter both are one model. A merged one must be let go before the base is asked for: it is loaded then.
    """
    folder = resolve_path(path)
    if not is_merged(folder):
        model, tokenizer = load_trained_model(path, settings)
        yield "tuned", model, tokenizer
        with model.disable_adapter():
            yield "base", model, tokenizer
        return
    base = read_settings(path)["base_model_name"]
    if settings.base_model_name != base:
        raise UserError(
            f"{display_path(folder)} was merged into {base} and cannot be measured against {settings.base_model_name};"
            f" leave out --base_model_name (if the base was moved, correct base_model in its {MERGE_RECORD})"
        )
    tokenizer = load_tokenizer(str(folder))
    say(f"Merged model: {display_path(folder)}, its base model: {base}")
    announce_system_text(tokenizer, settings.system_prompt)
    for name, source in (("tuned", str(folder)), ("base", base)):
        model = load_settings_base(settings._replace(base_model_name=source))
        fit_pad_token(tokenizer, model, choose_pad_token)
        check_prompt(model, tokenizer)
        yield name, model, tokenizer
        del model
        gc.collect()


class Merge(NamedTuple):
    """What was merged, and the losses that decided it, in nats a token."""

    base_model: str  # as the adapter names it
    merged_into: str  # FULL or DEQUANTIZED
    dtype: str  # number format of the merged weights, such as "bfloat16": the base's own
    adapter_loss: float | None  # of base + adapter, or None where nothing was scored
    losses: dict  # {FULL: loss, DEQUANTIZED: loss} of the candidates that were scored


def merge_and_save_model(model, tokenizer, path, models_dir=None):
    """Merge the adapter into its base model and save a folder that plain transformers loads; returns a Merge.

    merged_folder tells how. After 4-bit training the base is the dequantized one, since no rows decide here.
    """
    with merged_folder(model, tokenizer, path, models_dir) as (_, merge):
        pass
    say(f"Merged model saved to {display_path(resolve_path(path))}")
    return merge


@contextlib.contextmanager
def merged_folder(model, tokenizer, path, models_dir=None, score=None, into=None):
    """Yield (folder, Merge) of a merged model, to which files may be added; it is named `path` when all went well.

    The weights are in the number format that the base is stored in. An adapter that was trained in 4 bits can be merged
    into the base as it is stored (FULL), or into the weights that it was trained on (DEQUANTIZED). score is a function
    of a model that gives its loss in nats a token. With it both are made, and the one with the lower loss is kept;
    without it DEQUANTIZED, which answers as base + adapter did. into: one of the two, whatever they score.

    What is scored is read back from the disk, as its users will read it. Raises RuntimeError, with nothing saved, if
    merging changed the model.
    """
    quiet_libraries()
    target = resolve_path(path)
    if target.exists():
        raise UserError(f"{display_path(target)} exists already; remove it, or merge into another folder")
    check_mergeable(model)
    name = model.peft_config["default"].base_model_name_or_path
    models_dir = models_cache(models_dir or DEFAULTS["models_dir"], name)
    base_path, candidates = locate_model(name, models_dir), merge_candidates(model, score, into)
    size = stored_bytes(base_path, models_dir) * len(candidates)
    check_space(target, size, "the merged model", "free some, or merge into a folder on another disk")
    with storage_errors("the merged model", "mend that and merge again"), staged_folder(target) as staged:
        adapter_loss = score(model) if score else None
        losses = {}
        for candidate in candidates:
            say(f"Merging into {describe_candidate(candidate, name)}")
            with progress("Merging"):
                dtype, probed = write_candidate(model, tokenizer, base_path, models_dir, candidate, staged / candidate)
            losses[candidate] = score_candidate(model, tokenizer, staged / candidate, probed, score)
        best = min(losses, key=lambda candidate: losses[candidate] if math.isfinite(losses[candidate]) else math.inf)
        if score and into is None:
            check_same(max(losses[best], adapter_loss), adapter_loss)  # a lower loss is welcome
        for file in (staged / best).iterdir():
            file.rename(staged / file.name)
        for candidate in candidates:
            shutil.rmtree(staged / candidate)
        tokenizer.save_pretrained(staged)
        merge = Merge(name, best, dtype, adapter_loss, losses if score else {})
        write_json(staged / MERGE_RECORD, merge._asdict())
        yield staged, merge


def merge_candidates(model, score, into):
    """The bases that an adapter is merged into, to be compared."""
    if not four_bit_layers(model):
        if into == DEQUANTIZED:
            raise UserError("the adapter was not trained in 4 bits, so nothing can be dequantized; leave out --into")
        return [FULL]
    return [into] if into else [FULL, DEQUANTIZED] if score else [DEQUANTIZED]


def describe_candidate(candidate, name="the base model"):
    """The words for what an adapter is merged into."""
    return {FULL: f"{name} as it is stored", DEQUANTIZED: f"the 4-bit weights of {name}, dequantized"}[candidate]


def four_bit_layers(model):
    """{name of the layer in the base model: its 4-bit layer}, also of those that an adapter wraps."""
    layers = {name.removesuffix(".base_layer"): layer for name, layer in model.get_base_model().named_modules()}
    return {
        name: layer for name, layer in layers.items() if get_bnb_param_type(getattr(layer, "weight", None)) == "4bit"
    }


def stored_bytes(path, models_dir):
    """Bytes of a base model's weights as they are stored, which are those of a model merged from it."""
    return sum(file.stat().st_size for file in weight_files(model_folder(path, models_dir)))


def merging_device(model, path, models_dir):
    """The model's device, or the CPU where a GPU has no room for the whole base beside the model."""
    if model.device.type != "cuda" or torch.cuda.mem_get_info(model.device)[0] > 1.15 * stored_bytes(path, models_dir):
        return model.device
    return torch.device("cpu")


def write_candidate(model, tokenizer, path, models_dir, candidate, folder):
    """Merge the adapter into one of its bases and write it to a folder; returns (number format, its probe_loss)."""
    base = load_base_model(path, merging_device(model, path, models_dir), "auto", models_dir=models_dir)
    trained_on = four_bit_layers(model) if candidate == DEQUANTIZED else {}
    for name, layer in trained_on.items():
        base.get_submodule(name).weight.data.copy_(dequantized_weight(layer, base.get_submodule(name)))
    lora_config = copy.copy(model.peft_config["default"])
    lora_config.base_model_name_or_path = base.name_or_path
    with_adapter = get_peft_model(base, lora_config).eval()  # new layers are in training mode, with dropout
    set_peft_model_state_dict(with_adapter, get_peft_model_state_dict(model, save_embedding_layers=False))
    expected = probe_loss(with_adapter, tokenizer)
    merge_layers(with_adapter, trained_on)
    merged = with_adapter.unload()
    found = probe_loss(merged, tokenizer)
    check_same(found, expected)
    merged.config.use_cache = True
    prepare_generation_config(merged.generation_config, tokenizer)
    merged.save_pretrained(folder)
    return str(merged.dtype).removeprefix("torch."), found


def check_same(found, expected):
    """Raise RuntimeError unless two losses of one model, in nats a token, differ by no more than rounding explains."""
    if not abs(found - expected) < TOLERANCE * max(expected, 1):
        raise RuntimeError(f"merging changed the model: loss {found:.4f}, expected {expected:.4f}; nothing is saved")


@torch.no_grad()
def merge_layers(model, trained_on):
    """Merge an adapter into its base model: each layer's sum in float32, rounded once to the base's number format.

    trained_on: {name: 4-bit layer} of the layers whose weights are the dequantized ones, or {}.
    """
    generator = torch.Generator(model.device).manual_seed(0)  # the same merge gives the same bytes
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base_layer = layer.get_base_layer()
        formats = {parameter: parameter.dtype for parameter in base_layer.parameters()}
        for parameter in formats:
            parameter.data = parameter.data.float()
        if name in trained_on:
            base_layer.weight.copy_(dequantized_weight(trained_on[name], base_layer))
        layer.merge(safe_merge=True)
        for parameter, dtype in formats.items():
            parameter.data = round_stochastically(parameter.data, dtype, generator)


def round_stochastically(weight, dtype, generator):
    """Round float32 numbers to a 16-bit format, up or down by chance, the likelier the nearer: right on average.

    What an adapter adds to a weight is often less than half the distance to the next 16-bit number. Rounding to the
    nearest would take it back in most places, and with it much of what a short training has learned.
    """
    if dtype.itemsize != 2:
        return weight.to(dtype)
    step = round(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)  # of the format, in float32's last places
    chance = torch.randint(step, weight.shape, dtype=torch.int32, generator=generator, device=weight.device)
    return ((weight.view(torch.int32) + chance) & -step).view(torch.float32).to(dtype)


def dequantized_weight(layer, target):
    """The weights that a 4-bit layer computes with, as they lie in its unquantized counterpart."""
    weight = dequantize_bnb_weight(layer.weight)
    return weight.T if isinstance(target, Conv1D) else weight  # GPT-2's weights lie so


def score_candidate(model, tokenizer, folder, probed, score):
    """Read a merged model back, as its users will, and compare it with what was written; returns its loss by score."""
    gc.collect()  # the model that was written is gone, but for its circles
    merged = load_base_model(str(folder), merging_device(model, folder, None), model.dtype)
    check_same(probe_loss(merged, tokenizer), probed)
    return score(merged) if score else probed


@torch.no_grad()
def probe_loss(model, tokenizer):
    """Mean next-token loss of a fixed text, in nats: a fingerprint of the model."""
    ids = torch.tensor([tokenizer(PROBE_TEXT)["input_ids"]], device=model.device)
    return model(input_ids=ids, labels=ids, use_cache=False).loss.item()


def prepare_generation_config(generation_config, tokenizer):
    """End replies where training did, and make the config fit to be saved.

    Some hub models ship sampling options without do_sample, which save_pretrained refuses.
    """
    generation_config.eos_token_id = end_token_ids(tokenizer)
    generation_config.pad_token_id = tokenizer.pad_token_id
    if not generation_config.do_sample:
        for option in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(generation_config, option, None)
