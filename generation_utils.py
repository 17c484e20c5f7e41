"""Replies: in batches for evaluation, streamed for chat. Shared by train.py, evaluate.py and inference.py."""

import contextlib
from collections import defaultdict, namedtuple
from functools import lru_cache, partial
from itertools import groupby
from queue import Queue
from threading import Thread

import torch
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GenerationConfig, TextStreamer

from encoding_utils import encode_prompt
from engine_passes import autocast, transformers_model
from engine_replies import MAX_SLOTS, Decoder, cache_bytes
from engine_shards import is_sharded
from file_utils import digest
from message_utils import UserError, printable, say
from prompt_utils import end_token_ids
from thought_utils import MARKS
from token_utils import newest_positions

# A reply's text; whether it ended by itself (at a stop token) or was cut; and how many tokens the model wrote.
Reply = namedtuple("Reply", "text ended tokens")


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


@contextlib.contextmanager
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
    return max(context(model) - max_new_tokens, context(model) // 4)


def context(model):
    """How many tokens a model's positions reach."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20


def read_reply(tokenizer, ids, end_ids):
    """The Reply of generated token ids, which may go on with padding behind the token that ends it."""
    length = next((number for number, token in enumerate(ids) if token in end_ids), len(ids))
    text = decode_reply(tokenizer, ids[:length])
    return Reply(text.strip(), length < len(ids), min(length + 1, len(ids)))


def decode_reply(tokenizer, ids):
    """The text of a reply: without special tokens, but for those that mark a thought in it."""
    marks, text = thought_tokens(tokenizer), ""
    for is_mark, some in groupby(ids, key=marks.__contains__):
        some = list(some)
        text += "".join(map(marks.get, some)) if is_mark else tokenizer.decode(some, skip_special_tokens=True)
    return text


@lru_cache(maxsize=8)
def thought_tokens(tokenizer):
    """{id: text} of the special tokens of a tokenizer that stand in the marks of a thought, such as [THINK]."""
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {number: text for number, text in special.items() if text and any(text in mark for mark in MARKS)}


def ends(generation_config):
    """The ids of the tokens that end a reply."""
    ids = generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


# ---- Many replies ----------------------------------------------------------------------------------------------------
def generate_replies(
    model,
    tokenizer,
    conversations,
    generation_config,
    max_prompt_tokens=2**20,
    on_replies=lambda replies: None,
    numbers=None,
):
    """Answer conversations (lists of messages that end with the user's turn); returns a Reply of each, in their order.

    on_replies: called with {a conversation's index: its Reply} of those that are ready together, in any order.

    numbers: of the conversations among more of them. What is drawn for one on a CPU then depends on its number and the
    seed, and not on which others are answered with it.

    Prompts beyond max_prompt_tokens or the model's context lose their oldest part, as in training.
    """
    limit = min(max_prompt_tokens, prompt_limit(model, generation_config.max_new_tokens))
    prompts = [
        trim_history(encode_prompt(tokenizer, messages), limit, tokenizer.bos_token_id) for messages in conversations
    ]
    replies = {}
    for written in write_replies(model, prompts, generation_config, numbers):
        ready = {index: read_reply(tokenizer, ids, ends(generation_config)) for index, ids in written.items()}
        replies |= ready
        on_replies(ready)
    return [replies[index] for index in range(len(prompts))]


def write_replies(model, prompts, generation_config, numbers=None):
    """Yield {a prompt's index: the token ids of its reply} of those that are ready together, longest prompts first.

    prompts: token ids of each. numbers: as in generate_replies.

    Out of memory halves the number of rows that are computed together, and what was not yielded is computed again.
    """
    left = dict(enumerate(prompts))
    tokens = max(map(len, prompts), default=0) + generation_config.max_new_tokens
    slots = choose_slots(model, len(prompts), tokens)
    while left:
        decoder = None
        try:
            decoder = try_decoder(model, generation_config, slots, tokens)
            write = partial(write_by_decoder, decoder, numbers) if decoder else partial(write_by_generate, model, slots)
            for written in write(left, generation_config):
                for index in written:
                    del left[index]
                yield written
        except torch.OutOfMemoryError:
            if slots == 1 or is_sharded(model):
                raise
        finally:
            if decoder:
                decoder.close()
        if left:
            slots //= 2
            say(f"Out of memory in replies; going on with {slots} at once")


def choose_slots(model, count, tokens):
    """How many rows of so many tokens are computed together: what a GPU's free memory holds, with room to spare."""
    slots = min(count, MAX_SLOTS)
    if model.device.type == "cuda":
        unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        free = torch.cuda.mem_get_info(model.device)[0] + unused
        slots = min(slots, int(0.6 * free / (tokens * cache_bytes(transformers_model(model)))))
    if is_sharded(model):  # all processes compute together
        slots = min(gather_object([slots]))
    return max(slots, 1)


def try_decoder(model, generation_config, slots, tokens):
    """A Decoder of the model as it is now, or None where transformers' generate has to serve, which is said once."""
    try:
        if is_sharded(model):
            raise NotImplementedError("the weights are shared out over the processes")
        return Decoder(model, generation_config, slots, tokens)
    except NotImplementedError as error:
        say_slower(str(error))
        return None


@lru_cache
def say_slower(reason):
    say(f"Replies are written by transformers' generate, which is slower: {reason}")


def write_by_decoder(decoder, numbers, prompts, generation_config):
    """As write_replies, of prompts {index: token ids}."""
    indices, found = list(prompts), defaultdict(list)
    seeds = numbers and [seed_of(torch.initial_seed(), numbers[index]) for index in indices]
    for number, tokens, done in decoder.write(
        list(prompts.values()), generation_config.max_new_tokens, ends(generation_config), seeds
    ):
        found[number] += tokens
        if done:
            yield {indices[number]: found.pop(number)}


def write_by_generate(model, slots, prompts, generation_config):
    """As write_replies, of prompts {index: token ids}, in batches padded on the left.

    What is drawn for a batch depends on its prompts and the seed alone, and not on the batches before it.
    """
    order, seed = sorted(prompts, key=lambda index: -len(prompts[index])), torch.initial_seed()
    for start in range(0, len(order), slots):
        chosen = order[start : start + slots]
        if generation_config.do_sample:
            torch.manual_seed(seed_of(seed, [prompts[index] for index in chosen]))
        batch = left_pad([prompts[index] for index in chosen], generation_config.pad_token_id, model.device)
        with generating(model):
            output = model.generate(**batch, generation_config=generation_config, synced_gpus=is_sharded(model))
        yield dict(zip(chosen, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True))


def seed_of(seed, what):
    """A seed that depends on another one and on the number of a row, or on prompts (token ids of each)."""
    return int.from_bytes(digest(f"{seed} {what}", size=7))


def left_pad(prompts, pad_id, device):
    """Batch prompts of token ids with padding on the left, where generation needs it; (rows, longest) each."""
    longest = max(len(ids) for ids in prompts)
    input_ids = [[pad_id] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


# ---- One reply, as it is written -------------------------------------------------------------------------------------
class Decoders:
    """The decoders of a chat, one with the adapter and one without it, kept from reply to reply while they fit.

    close() gives their memory back. Replies of both to the same prompt may be written by turns, where the one with the
    adapter is begun first.
    """

    def __init__(self):
        self.fit, self.kept = None, {}

    def get(self, model, generation_config, tokens):
        """A Decoder of one slot of at least so many tokens, or None where transformers' generate has to serve."""
        fit = id(model), generation_config.to_dict()
        if fit != self.fit or any(decoder and decoder.length < tokens for decoder in self.kept.values()):
            self.close()
        self.fit = fit
        adapters = tuple(layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer))
        if adapters not in self.kept:
            if not any(adapters):  # what a Decoder computes is compared with the model: no other may have changed it
                self.close()
            length = min(max(2 * tokens, 1024), context(model))
            self.kept[adapters] = try_decoder(model, generation_config, 1, max(length, tokens))
        return self.kept[adapters]

    def close(self):
        for decoder in reversed(self.kept.values()):  # each takes back what it set, in the opposite order
            if decoder:
                decoder.close()
        self.kept = {}


class stream_reply:
    """Iterate over a reply in printable chunks as it is written; afterwards `reply` is the Reply.

    A chunk is the text of a step, and may be empty. From the first one on `can_wait` tells whether the model may be
    used otherwise between two chunks. close() stops the model after its token. decoders: keeps what the next reply can
    use too. A prompt beyond the model's context is a UserError: nothing is cut off it.
    """

    def __init__(self, model, tokenizer, messages, generation_config, decoders=None):
        prompt, limit = encode_prompt(tokenizer, messages), prompt_limit(model, generation_config.max_new_tokens)
        if len(prompt) > limit:
            raise UserError(
                f"the prompt has {len(prompt):,} tokens, and the model's context leaves room for {limit:,} beside"
                f" {generation_config.max_new_tokens:,} of the reply; shorten it, or lower --max_new_tokens"
            )
        self.reply, self.can_wait = None, False
        self.chunks = self._stream(model, tokenizer, prompt, generation_config, decoders)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.chunks)

    def close(self):
        self.chunks.close()

    def _stream(self, model, tokenizer, prompt, generation_config, decoders):
        ids, end_ids, text = [], ends(generation_config), Text(tokenizer)
        with contextlib.ExitStack() as stack:
            if decoders is None:
                decoders = stack.enter_context(contextlib.closing(Decoders()))
            decoder = decoders.get(model, generation_config, len(prompt) + generation_config.max_new_tokens)
            self.can_wait = decoder is not None
            if decoder:
                written = decoder.write([prompt], generation_config.max_new_tokens, end_ids)
                steps = (tokens for _, tokens, _ in written)
                stack.enter_context(contextlib.closing(written))
            else:
                steps = stack.enter_context(contextlib.closing(generate_tokens(model, prompt, generation_config)))
            try:
                for tokens in steps:
                    ids += tokens
                    yield "".join(text.add(token) for token in tokens if token not in end_ids)
                yield text.finish()
            finally:
                self.reply = read_reply(tokenizer, ids, end_ids)


class Text(TextStreamer):
    """Turns the tokens of a reply into printable text, as soon as more tokens cannot change it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.marks = thought_tokens(tokenizer)

    def add(self, token):
        self.ready = ""
        if token in self.marks:
            self.end()
            self.ready += self.marks[token]
        else:
            self.put(torch.tensor([token]))
        return self.ready

    def finish(self):
        self.ready = ""
        self.end()
        return self.ready

    def on_finalized_text(self, text, stream_end=False):
        self.ready += printable(text)


def generate_tokens(model, prompt, generation_config):
    """Yield [a token] as transformers' generate writes them after a prompt, in a thread that stops with the caller."""
    batch = left_pad([prompt], generation_config.pad_token_id, model.device)
    tokens, stop, failures = Queue(), StopFlag(), []

    class Put:
        """What generate calls a streamer: it gets the prompt, of shape (1, tokens), then each token, (1,)."""

        def put(self, value):
            if value.dim() == 1:
                tokens.put(value.item())

        def end(self):
            pass

    def generate():
        try:
            with generating(model):
                streaming = {"streamer": Put(), "stopping_criteria": [stop]}
                model.generate(**batch, generation_config=generation_config, **streaming)
        except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread below
            failures.append(error)
        finally:
            tokens.put(None)

    thread = Thread(target=generate, name="replies", daemon=True)
    thread.start()
    try:
        while (token := tokens.get()) is not None:
            yield [token]
    finally:
        stop.set = True
        thread.join()
    if failures:
        raise failures[0]


class StopFlag:
    """A stopping criterion that ends generation once `set` is true."""

    set = False

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.set, dtype=torch.bool, device=input_ids.device)
