"""Speed of replies on this machine: this project, transformers' generate and Unsloth, in one run.

    python benchmarks/speed.py prepare --rows FILE       # once: a model of Mistral-7B's shape and its 4-bit copy
    python benchmarks/replies.py --out replies.jsonl     # every program on every model, a process each
    python benchmarks/replies.py --only ours --models 4bit --rows 1,16 --new_tokens 64
    python benchmarks/speed.py plot replies.jsonl chart.svg
    python benchmarks/speed.py prepare --device cpu && python benchmarks/replies.py --device cpu --only ours,generate

Every program writes the same number of tokens after the same prompts of 64 random tokens, greedily, with the same
adapter (r=16 on all linear layers) on the 4-bit model, and with none on the 16-bit one, as after a merge.
tokens/s: median of the runs after the first, of whole calls, with the prompts and all that a call prepares.
first_token: seconds until the first token after a prompt of 500 tokens, the second time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROGRAMS = ("ours", "generate", "unsloth")
PROMPT_TOKENS, LONG_PROMPT = 64, 500


def main():
    options = build_parser().parse_args()
    options.work_dir = options.work_dir or Path(tempfile.gettempdir()) / f"lora-speed-{options.device}"
    if options.measure:
        return measure(options)
    for model in options.models.split(","):
        for program in options.only.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", program, "--models", model]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=options.timeout, check=False)
            found = [line for line in done.stdout.splitlines() if line.startswith("{")]
            for line in found or [json.dumps({"program": program, "model": model, "failed": done.returncode})]:
                print(line, flush=True)
                with options.out.open("a") as out:
                    out.write(line + "\n")
    return 0


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work_dir", type=Path, help="as given to speed.py prepare")
    parser.add_argument("--only", default=",".join(PROGRAMS), help="programs, separated by commas")
    parser.add_argument("--models", default="4bit,16bit", help="4bit has an adapter, 16bit has none")
    parser.add_argument("--rows", default="1,16,64", help="prompts that are answered together, separated by commas")
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3, help="timed runs, after one that is not")
    parser.add_argument("--timeout", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("replies.jsonl"))
    parser.add_argument("--measure", choices=PROGRAMS, help=argparse.SUPPRESS)
    return parser


# ---- One program on one model ----------------------------------------------------------------------------------------
def measure(options):
    program = options.measure
    if program == "unsloth":
        import unsloth  # noqa: F401  before transformers, which it changes
    import torch

    import speed

    prepared = json.loads((options.work_dir / "prepared.json").read_text())
    model = load(program, prepared, options.models, options.device)
    words = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)

    def prompts(rows, length):
        return torch.randint(5, words, (rows, length), generator=draw).tolist()

    write = {"ours": Ours, "generate": Generate, "unsloth": Generate}[program](model, options)
    gpu = options.device == "cuda"
    for rows in map(int, options.rows.split(",")):
        seconds = []
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(options.runs + 1):
            asked = prompts(rows, PROMPT_TOKENS)
            started = time.perf_counter()
            tokens = write.replies(asked, options.new_tokens)
            seconds.append(time.perf_counter() - started)
            assert tokens == rows * options.new_tokens, (tokens, rows)
        report = {
            "program": program,
            "model": options.models,
            "rows": rows,
            "tokens_per_second": round(rows * options.new_tokens / statistics.median(seconds[1:]), 1),
            "first_run_seconds": round(seconds[0], 2),
        }
        if rows == 1:
            write.first_token(prompts(1, LONG_PROMPT)[0])
            report["first_token"] = round(write.first_token(prompts(1, LONG_PROMPT)[0]), 3)
        if gpu:
            report["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        print(json.dumps(report | speed.machine(options.device)), flush=True)
    return 0


def load(program, prepared, kind, device):
    """The 4-bit model with an adapter whose B is not zero, or the 16-bit one as it is after a merge."""
    import torch

    path, dtype = prepared["copy" if kind == "4bit" else "base"], torch.bfloat16 if device == "cuda" else torch.float32
    adapter = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none"}
    if program == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            path, max_seq_length=1024, load_in_4bit=kind == "4bit", dtype=dtype
        )
        if kind == "4bit":
            names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
            model = FastLanguageModel.get_peft_model(model, target_modules=names, random_state=0, **adapter)
        FastLanguageModel.for_inference(model)
    else:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, device_map={"": device}, dtype=dtype)
        if kind == "4bit":
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **adapter))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.01)
    return model.eval()


class Ours:
    """This project's replies: a decoder for each call, and a kept one for the first token, as in a chat."""

    def __init__(self, model, options):
        import generation_utils

        self.utils, self.model, self.decoders = generation_utils, model, generation_utils.Decoders()

    def replies(self, prompts, new_tokens):
        generation = greedy(new_tokens)
        if len(prompts) > 1:
            return sum(
                len(ids)
                for group in self.utils.write_replies(self.model, prompts, generation)
                for ids in group.values()
            )
        decoder = self.decoders.get(self.model, generation, PROMPT_TOKENS + LONG_PROMPT + new_tokens)
        return sum(len(tokens) for _, tokens, _ in decoder.write(prompts, new_tokens, set()))

    def first_token(self, prompt):
        import torch

        [decoder] = self.decoders.kept.values()
        started = time.perf_counter()
        next(decoder.write([prompt], 8, set()))
        if decoder.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started


class Generate:
    """generate of transformers, or what Unsloth makes of it."""

    def __init__(self, model, options):
        self.model, self.device = model, options.device

    def replies(self, prompts, new_tokens):
        import torch

        ids = torch.tensor(prompts).to(self.device)
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy(new_tokens)
            )
        return (out.shape[1] - ids.shape[1]) * len(out)

    def first_token(self, prompt):
        started = time.perf_counter()
        self.replies([prompt], 1)
        return time.perf_counter() - started


def greedy(new_tokens):
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
