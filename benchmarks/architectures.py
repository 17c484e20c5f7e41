"""Which architectures train, and how:   python benchmarks/architectures.py [name ...]

Each is a tiny random model of two layers, without a download. It trains two steps on rows laid end to end, if it keeps
them apart, is saved, loaded and scored, generates and is merged, on the CPU in a second or less. The gradient and the
scores are compared with those of single rows in plain transformers. tests/test_architectures.py runs the same table.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generation_utils
import model_utils
from engine_passes import forget_longer_rows, transformers_model
from engine_runner import StepRunner
from file_utils import PROJECT_DIR
from message_utils import quiet_libraries
from plan_utils import StepPlan
from settings_utils import DEFAULTS, Settings

VOCABULARY = 8000  # of the bundled tokenizer, which they all use
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
HEADS = {"head_dim": 4}
MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
SCALED = {"rope_theta": 10000.0, "factor": 4.0}
LONG = {"short_factor": [1.0] * 2, "long_factor": [8.0] * 2, "original_max_position_embeddings": 32}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DELTA_NET = {
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {name: value for name, value in SIZES.items() if not name.endswith("token_id")}

# name: the config's values beside SIZES; the model type is the name's first word unless it is given
ARCHITECTURES = {
    "llama": {},
    "llama, rope dynamic": {
        "max_position_embeddings": 32,
        "rope_parameters": SCALED | {"rope_type": "dynamic"},
    },
    "llama, rope longrope": {"rope_parameters": SCALED | LONG | {"rope_type": "longrope"}},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": HEADS | {"sliding_window": 16},
    "gemma3_text": HEADS | {"sliding_window": 16},
    "gemma3 (multimodal)": {"text_config": TEXT | HEADS, "vision_config": VISION, "mm_tokens_per_image": 4},
    "phi": {},
    "phi3": {},
    "cohere": {},
    "olmo": {},
    "olmo2": {},
    "starcoder2": {},
    "stablelm": {},
    "granite": {},
    "smollm3": {},
    "ernie4_5": HEADS,
    "glm": HEADS,
    "nemotron": {},
    "seed_oss": HEADS,
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"decoder_sparse_step": 1},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 1},
    "olmoe": EXPERTS,
    "gpt_oss": EXPERTS | HEADS,
    "granitemoe": EXPERTS,
    "phimoe": EXPERTS,
    "llama4_text": EXPERTS | HEADS | {"intermediate_size_mlp": 24},
    "gpt2": {},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "gpt_bigcode": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {},
    "falcon": {},
    "mpt": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "recurrent_gemma": {"lru_width": 16, "block_types": ["recurrent", "attention"]},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "falcon_mamba": {"state_size": 4},
    "jamba": EXPERTS | {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": MAMBA_2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": EXPERTS | MAMBA_2 | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 24},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "qwen3_next": EXPERTS | HEADS | DELTA_NET,
    "deepseek_v3": EXPERTS | LATENT,
    "rwkv": {"context_length": 128},
}
LENGTHS = (5, 60, 17, 40, 31)
CPU = torch.device("cpu")


class Outcome(NamedTuple):
    """What became of an architecture: how rows are laid, what LoRA adapts, and how far off single rows."""

    name: str
    rows: str = "-"  # "end to end" or "one a pass"
    layers: int = 0  # with an adapter
    gradient: float = 0.0  # relative distance to that of single rows in plain transformers
    scores: float = 0.0  # the largest relative distance to those of single rows
    merged: float = 0.0  # the largest distance of the merged model's logits
    idle: int = 0  # LoRA weights that get no gradient
    left_out: str = ""  # what is named as without an adapter
    seconds: float = 0.0
    problem: str = ""


def build_config(name):
    changes = ARCHITECTURES[name]
    kind = name.split(" ")[0].strip(",")
    sizes = {} if "text_config" in changes else SIZES
    config = AutoConfig.for_model(kind, **sizes | changes)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for option, value in part.to_dict().items():
            if isinstance(value, float) and ("drop" in option or "jitter" in option):
                setattr(part, option, 0.0)  # what is random cannot be compared
    return config


def random_rows(lengths=LENGTHS):
    """Rows of random tokens whose second half is trained."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :], "row": number})
    return rows


def save_base(name, folder):
    """A tiny random model with the bundled tokenizer in a folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(build_config(name)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PROJECT_DIR / "models" / "tiny-base" / file, folder)


def plain_row(model, row):
    """The summed loss of a row's trained tokens in plain transformers, as if no longer row had been met before."""
    forget_longer_rows(transformers_model(model))
    logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum")


def plain_gradient(model, rows):
    """The gradient of the mean loss a trained token, one row at a time in plain transformers and peft."""
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    for row in rows:
        (plain_row(model, row) / count).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def gradients(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])


def try_architecture(name, folder):
    """Train, save, load, score, generate and merge one architecture; an Outcome."""
    started, said = time.perf_counter(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            outcome = try_steps(name, Path(folder))
    except Exception as error:  # noqa: BLE001  a table of outcomes names whatever failed
        outcome = Outcome(name, problem=f"{type(error).__name__}: {error}".split("\n")[0])
    named = [
        line.split("leaves out ")[1].split(": they")[0] for line in said.getvalue().split("\n") if "leaves out" in line
    ]
    return outcome._replace(seconds=time.perf_counter() - started, left_out="; ".join(named))


def try_steps(name, folder):
    save_base(name, folder / "base")
    settings = Settings(**DEFAULTS)._replace(
        base_model_name=str(folder / "base"),
        use_4bit_quantization=False,
        device="cpu",
        lora_r=2,
        lora_dropout=0.0,
        max_new_tokens=3,
        do_sample=False,
    )
    base = model_utils.find_base(settings)
    model, base = model_utils.load_for_training(settings, base)
    model = model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    draw = torch.Generator().manual_seed(1)
    for parameter_name, parameter in trained.items():
        if "lora_B" in parameter_name:
            parameter.data.normal_(std=0.05, generator=draw)
    rows = random_rows()
    expected = plain_gradient(model, rows)
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    with StepRunner(model, StepPlan(max_pass_tokens=1000, rows_a_step=len(rows), longest_row=max(LENGTHS))) as runner:
        runner.step(rows)
        found = gradients(model)
        idle = sum(p.grad is None for p in trained.values())
        optimizer.step()
        runner.step(rows)
        optimizer.step()
        scores = [nll for nll, _ in runner.score(rows)]
        how = "end to end" if runner.plan.max_pass_tokens else "one a pass"
    model_utils.save_adapter(model, base.tokenizer, folder / "adapter", base.content)
    model_utils.write_recorded_settings(folder / "adapter", settings)
    loaded, tokenizer = model_utils.load_trained_model(folder / "adapter", settings)
    with torch.no_grad():
        alone = [plain_row(loaded, row).item() for row in rows]
    generation = generation_utils.build_generation_config(tokenizer, settings)
    talk = [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "How do I clean a chain?"}]]
    generation_utils.generate_replies(loaded, tokenizer, talk, generation)
    "".join(generation_utils.stream_reply(loaded, tokenizer, talk[0], generation))
    model_utils.merge_and_save_model(loaded, tokenizer, folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    ids = torch.tensor([rows[2]["input_ids"]])
    with torch.no_grad():
        difference = (merged(input_ids=ids).logits - loaded(input_ids=ids).logits).abs().max().item()
    return Outcome(
        name,
        how,
        sum("lora_A" in name for name in trained),
        ((found - expected).norm() / expected.norm()).item(),
        max(abs(a - b) / b for a, b in zip(scores, alone, strict=True)),
        difference,
        idle,
    )


def describe(found):
    """An Outcome as a line of the table."""
    figures = f"{found.gradient:8.0e}  {found.scores:6.0e}  {found.merged:6.0e}  {found.seconds:7.1f}"
    idle = f"{found.idle} LoRA weights without a gradient; " if found.idle else ""
    return f"{found.name:<21} {found.rows:<10} {found.layers:>6}  {figures}  {idle}{found.problem or found.left_out}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(ARCHITECTURES)}; default: all")
    names = parser.parse_args().names or list(ARCHITECTURES)
    quiet_libraries()
    torch.set_num_threads(1)
    print("architecture          rows       layers  gradient  scores  merged  seconds  left out, or the problem")
    failed = 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = try_architecture(name, folder)
        failed += bool(found.problem)
        print(describe(found), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
