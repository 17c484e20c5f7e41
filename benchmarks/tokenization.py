"""Tokenization against a bare tokenizer call on the same texts, and its memory: python benchmarks/tokenization.py

Writes --rows rows of about 300 tokens to a temporary folder. The bare call gets the finished prompts, rendered
beforehand; ours reads the file, checks and de-duplicates the rows, renders, encodes, masks, checks and stores them.
"""

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data_utils
import model_utils
import prompt_utils
import token_utils
from message_utils import quiet_libraries

WORDS = ["the", "of", "shop", "chain", "wheel", "brake", "order", "return", "light", "tyre", "what", "when", "should"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--words", type=int, default=110, help="words in a question and in an answer each")
    parser.add_argument("--memory_only", action="store_true", help="no bare call, which holds all rows in memory")
    parser.add_argument("--processes", type=int, help="tokenize with so many instead of what token_utils.py chooses")
    options = parser.parse_args()
    quiet_libraries()
    tokenizer = model_utils.load_tokenizer("models/tiny-base")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, options.rows, options.words)
        print(f"{path.stat().st_size / 2**20:,.0f} MiB of JSONL, {memory():,.0f} MiB of memory before", flush=True)
        figures = {"read": [], "tokenize": [], "bare call": []}
        for repeat in range(options.repeats):
            conversations = timed(figures["read"], data_utils.load_conversations, path, None, f"{folder}/{repeat}")[0]
            rows = timed(
                figures["tokenize"],
                token_utils.tokenize_conversations,
                *(tokenizer, conversations, 512, "data", f"{folder}/{repeat}", options.processes),
            )
            tokens = int(rows.index["length"].sum())
            print(f"{tokens:,} tokens, peak {memory():,.0f} MiB, largest worker {worker_memory():,.0f} MiB", flush=True)
            if not options.memory_only:
                texts = [prompt_utils.render(tokenizer, messages, False) for _, messages in conversations]
                timed(figures["bare call"], tokenizer, texts, add_special_tokens=False)
                del texts
    for name, seconds in figures.items():
        if seconds:
            print(f"{name}: {statistics.median(seconds):.2f} s (of {', '.join(f'{s:.2f}' for s in seconds)})")
    if not options.memory_only:
        ratio = statistics.median(a / b for a, b in zip(figures["tokenize"], figures["bare call"], strict=True))
        print(f"tokenize / bare call: {ratio:.2f}")


def write_rows(path, rows, words):
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            question, answer = (" ".join(draw.choices(WORDS, k=words)) for _ in range(2))
            file.write(json.dumps({"instruction": f"{number} {question}", "response": answer}) + "\n")


def timed(figures, function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    figures.append(time.perf_counter() - start)
    return result


def memory():
    return model_utils.measured_peak(model_utils.torch.device("cpu")) * 1024


def worker_memory():
    """Peak MiB of the largest process that was started, with the pages that it shares with this one."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
