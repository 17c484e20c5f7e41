"""Pre-train the bundled base model (models/tiny-base) from scratch on a folder of plain text.

    python models/pretrain_tiny_base.py --corpus_dir CORPUS --minutes 15     # on one data-centre GPU

CORPUS holds .txt or .txt.xz files in UTF-8, documents separated by one blank line; valid.txt is held out. The run is
bounded by time, not by steps: the learning rate follows the elapsed share of --minutes, so a slower GPU sees fewer
tokens and still ends with a finished schedule. The model card lists the data, the recipe's figures and the limits.
"""

import argparse
import json
import lzma
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 8000
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"] + [f"<|reserved_{i}|>" for i in range(5)]
CONTEXT = 1024
# Share of the training tokens that each source supplies. Stories and questions are far above their share of the text:
# they are what a model of this size can do well.
SOURCE_SHARES = {
    "01_stories": 0.14,
    "02_children_books": 0.44,
    "03_wikipedia_simpler": 0.22,
    "04_qa": 0.16,
    "05_news_facts": 0.04,
}
PROMPTS = [
    "Once upon a time",
    "The little dog was very hungry, so",
    "The sun is",
    "A bicycle is",
    "Question: What is the capital of France?\nAnswer:",
]


def read_documents(path):
    """Return the documents of one .txt or .txt.xz file: its text split at blank lines."""
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    return [document.strip() for document in text.split("\n\n") if document.strip()]


def read_corpus(corpus_dir):
    """Map each source's name (file name without suffixes) to its documents."""
    paths = sorted(path for path in Path(corpus_dir).iterdir() if path.name.endswith((".txt", ".txt.xz")))
    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name.split(".")[0] for path in paths), pool.map(read_documents, paths), strict=True))


def train_tokenizer(documents):
    """Train a byte-level BPE tokenizer (any text round-trips) that puts <s> first, as Llama and Mistral do."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    bos_id = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer, documents, device):
    """Return all documents as one int16 tensor: <s> document </s> <s> document </s> ..."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents)
    ids = [torch.tensor([*encoding.ids, tokenizer.eos_token_id], dtype=torch.int16) for encoding in encodings]
    return torch.cat(ids).to(device)


def sample_batch(sources, rows, bos_id):
    """Draw `rows` windows of CONTEXT + 1 tokens from random places; returns inputs and targets, (rows, CONTEXT) each.

    Every window starts with <s>, whatever stood there, since every text that the model will meet does.
    """
    shares = torch.tensor([SOURCE_SHARES[name] for name in sources])
    counts = torch.bincount(torch.multinomial(shares, rows, replacement=True), minlength=len(sources)).tolist()
    windows = []
    for ids, count in zip(sources.values(), counts, strict=True):
        starts = torch.randint(len(ids) - CONTEXT - 1, (count, 1), device=ids.device)
        windows.append(ids[starts + torch.arange(CONTEXT + 1, device=ids.device)].long())
    batch = torch.cat(windows)
    batch[:, 0] = bos_id
    return batch[:, :-1], batch[:, 1:]


def next_token_loss(hidden_states, weight, targets, reduction="mean"):
    """Cross entropy of the tied output layer; hidden_states (rows, time, hidden), targets (rows, time)."""
    logits = F.linear(hidden_states, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def build_model():
    config = MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
    )
    return MistralForCausalLM(config)


def build_optimizer(model, learning_rate):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def schedule(progress, step, warmup_steps=200):
    """Linear warm-up, then a linear decay to zero as `progress` goes from 0 to 1."""
    return min((step + 1) / warmup_steps, 1.0) * max(1.0 - progress, 0.0)


def train(model, sources, args, bos_id):
    """Train for args.minutes; returns tokens seen, steps and seconds."""
    device = model.device
    optimizer = build_optimizer(model, args.learning_rate)
    loss_function = next_token_loss
    if device.type == "cuda":
        loss_function = torch.compile(next_token_loss)
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    start, step, progress = time.time(), 0, 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(progress, step)
        inputs, targets = sample_batch(sources, args.rows, bos_id)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden_states = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            loss = loss_function(hidden_states, model.lm_head.weight, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0 or step == 1:
            progress = (time.time() - start) / (args.minutes * 60)
            rate = step * args.rows * CONTEXT / (time.time() - start)
            print(f"step {step} loss {loss.item():.4f} norm {norm.item():.2f} {rate:,.0f} tokens/s {progress:.1%}")
    seconds = round(time.time() - start)
    return {"training_tokens": step * args.rows * CONTEXT, "training_steps": step, "training_seconds": seconds}


@torch.no_grad()
def held_out_nll(model, tokenizer, documents):
    """Return bits a byte, perplexity a byte and perplexity a token over whole documents, cut into CONTEXT windows."""
    nll, tokens, size = 0.0, 0, 0
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        size += len(document.encode("utf-8"))
        for begin in range(0, len(ids), CONTEXT):
            window = torch.tensor([[tokenizer.bos_token_id, *ids[begin : begin + CONTEXT]]], device=model.device)
            hidden_states = model.model(input_ids=window[:, :-1], use_cache=False).last_hidden_state
            nll += next_token_loss(hidden_states, model.lm_head.weight, window[:, 1:], reduction="sum").item()
            tokens += window.shape[1] - 1
    return {
        "bits_per_byte": round(nll / size / math.log(2), 4),
        "perplexity_per_byte": round(math.exp(nll / size), 4),
        "perplexity_per_token": round(math.exp(nll / tokens), 3),
        "held_out_tokens": tokens,
        "held_out_bytes": size,
    }


def continuations(model, tokenizer):
    """Continue each of PROMPTS by 80 tokens, greedily and sampled; returns {prompt [way]: text}."""
    ways = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 0.7}}
    texts = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        for name, options in ways.items():
            output = model.generate(**inputs, max_new_tokens=80, pad_token_id=0, **options)
            texts[f"{prompt} [{name}]"] = tokenizer.decode(output[0], skip_special_tokens=True)
    return texts


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus_dir", required=True)
    parser.add_argument("--output_dir", default=str(Path(__file__).parent / "tiny-base"))
    parser.add_argument("--minutes", type=float, default=15.0, help="training time, without tokenization")
    parser.add_argument("--rows", type=int, default=256, help=f"windows of {CONTEXT} tokens to an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer_only", action="store_true", help="train and save the tokenizer, then stop")
    return parser.parse_args()


def load_or_train_tokenizer(output_dir, corpus):
    """Use the tokenizer that lies in output_dir, or train one on the corpus and put it there."""
    if not (Path(output_dir) / "tokenizer.json").exists():
        train_tokenizer(document for documents in corpus.values() for document in documents).save_pretrained(output_dir)
    return AutoTokenizer.from_pretrained(output_dir)


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = read_corpus(args.corpus_dir)
    held_out = corpus.pop("valid")
    tokenizer = load_or_train_tokenizer(args.output_dir, corpus)
    if args.tokenizer_only:
        return
    sources = {name: encode_documents(tokenizer, documents, device) for name, documents in corpus.items()}
    counts = {name: len(ids) for name, ids in sources.items()}
    print(f"tokens by source: {counts}, {sum(counts.values()):,} in all", flush=True)
    model = build_model().to(device)
    figures = train(model, sources, args, tokenizer.bos_token_id)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(args.output_dir)
    figures |= held_out_nll(model, tokenizer, held_out)
    figures |= {"unique_tokens": counts, "parameters": sum(p.numel() for p in model.parameters())}
    report = {"figures": figures, "continuations": continuations(model, tokenizer)}
    print(json.dumps(report, indent=2, ensure_ascii=False))
    (Path(args.output_dir) / "pretraining.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
