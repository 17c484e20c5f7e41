"""Replies: in batches for evaluation, streamed for chat. Shared by train.py, evaluate.py and inference.py."""

from collections import namedtuple
from contextlib import contextmanager
from threading import Thread

import torch
from transformers import GenerationConfig, TextIteratorStreamer

from engine_passes import autocast
from message_utils import UserError, printable
from prompt_utils import encode_prompt, end_token_ids
from token_utils import newest_positions

# A reply's text; whether it ended by itself (at a stop token) or was cut; and how many tokens the model wrote.
Reply = namedtuple("Reply", "text ended tokens")
BATCH = 8


def build_generation_config(tokenizer, settings):
    """Sampling settings; a reply ends at EOS or at the token that the chat template writes after an answer."""
    # top_k=0 keeps the model's own generation config from filling in another value
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.do_sample else {}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.do_sample,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=end_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )


@contextmanager
def generating(model):
    """Compute replies without gradients, in half precision, and without cuDNN's attention.

    cuDNN would prepare its attention anew, for tens of milliseconds, at each length of a growing reply.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with torch.no_grad(), autocast(model):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def trim_history(prompt_ids, limit, bos_id):
    """Keep a prompt's BOS and its newest tokens, `limit` in all, as training does."""
    if len(prompt_ids) <= limit:
        return prompt_ids
    return [prompt_ids[index] for index in newest_positions(prompt_ids, len(prompt_ids), limit, bos_id)]


def prompt_limit(model, max_new_tokens):
    """Tokens of prompt that leave room for the reply within the model's context."""
    context = getattr(model.config, "max_position_embeddings", None) or 2**20
    return max(context - max_new_tokens, context // 4)


def left_pad(prompts, pad_id, device):
    """Batch prompts of token ids with padding on the left, where generation needs it; (rows, longest) each."""
    longest = max(len(ids) for ids in prompts)
    input_ids = [[pad_id] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def read_reply(tokenizer, ids, end_ids):
    """The Reply of generated token ids, which may go on with padding behind the token that ends it."""
    length = next((number for number, token in enumerate(ids) if token in end_ids), len(ids))
    text = tokenizer.decode(ids[:length], skip_special_tokens=True)
    return Reply(text.strip(), length < len(ids), min(length + 1, len(ids)))


def ends(generation_config):
    """The ids of the tokens that end a reply."""
    ids = generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def generate_replies(
    model, tokenizer, conversations, generation_config, max_prompt_tokens=2**20, on_reply=lambda index, reply: None
):
    """Answer conversations (lists of messages that end with the user's turn); returns a Reply of each, in their order.

    on_reply: called with a conversation's index and its Reply as each is ready, in any order.

    Prompts beyond max_prompt_tokens or the model's context lose their oldest part, as in training.
    """
    limit = min(max_prompt_tokens, prompt_limit(model, generation_config.max_new_tokens))
    prompts = [
        trim_history(encode_prompt(tokenizer, messages), limit, tokenizer.bos_token_id) for messages in conversations
    ]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    replies = [None] * len(prompts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = left_pad([prompts[index] for index in chosen], tokenizer.pad_token_id, model.device)
        with generating(model):
            output = model.generate(**batch, generation_config=generation_config)
        for index, ids in zip(chosen, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            replies[index] = read_reply(tokenizer, ids, ends(generation_config))
            on_reply(index, replies[index])
    return replies


class stream_reply:
    """Iterate over a reply in printable chunks as it is generated; afterwards `reply` is the Reply.

    close() stops the model after its token. A prompt beyond the model's context is a UserError: nothing is cut off it.
    """

    def __init__(self, model, tokenizer, messages, generation_config):
        prompt, limit = encode_prompt(tokenizer, messages), prompt_limit(model, generation_config.max_new_tokens)
        if len(prompt) > limit:
            raise UserError(
                f"the prompt has {len(prompt):,} tokens, and the model's context leaves room for {limit:,} beside"
                f" {generation_config.max_new_tokens:,} of the reply; shorten it, or lower --max_new_tokens"
            )
        self.reply = None
        self.chunks = self._stream(model, tokenizer, prompt, generation_config)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.chunks)

    def close(self):
        self.chunks.close()

    def _stream(self, model, tokenizer, prompt, generation_config):
        batch = left_pad([prompt], tokenizer.pad_token_id, model.device)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, outputs, failures = StopFlag(), [], []

        def generate():
            try:
                with generating(model):
                    outputs.append(
                        model.generate(
                            **batch, generation_config=generation_config, streamer=streamer, stopping_criteria=[stop]
                        )
                    )
            except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread below
                failures.append(error)
            finally:
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            for chunk in streamer:
                if chunk:
                    yield printable(chunk)
        finally:
            stop.set = True
            thread.join()
            if outputs:
                self.reply = read_reply(tokenizer, outputs[0][0, len(prompt) :].tolist(), ends(generation_config))
        if failures:
            raise failures[0]


class StopFlag:
    """A stopping criterion that ends generation once `set` is true."""

    set = False

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.set, dtype=torch.bool, device=input_ids.device)
