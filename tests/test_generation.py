"""Replies: left-padded batches, streaming, stopping, and output that cannot steer a terminal."""

import threading

import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import TINY_BASE
from encoding_utils import encode_prompt
from generation_utils import (
    Text,
    build_generation_config,
    generate_replies,
    left_pad,
    prompt_limit,
    read_reply,
    stream_reply,
    trim_history,
    write_replies,
)
from message_utils import printable
from settings_utils import DEFAULTS, Settings
from thought_utils import without_thought

SETTINGS = Settings(**DEFAULTS)._replace(do_sample=False, max_new_tokens=12)
PROMPTS = ["Once upon a time", "Say yes.", "The little dog was very hungry and it went to the big house, so it"]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32).eval()


def conversation(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def no_decoder(monkeypatch):
    """A model that transformers' generate has to serve."""
    monkeypatch.setattr("generation_utils.try_decoder", lambda *args: None)


@pytest.mark.parametrize("decoder", [True, False])
def test_replies_in_a_batch_are_those_of_single_prompts(model, tokenizer, monkeypatch, request, decoder):
    if not decoder:
        request.getfixturevalue("no_decoder")
    generation = build_generation_config(tokenizer, SETTINGS)
    alone = [generate_replies(model, tokenizer, [conversation(text)], generation)[0] for text in PROMPTS]
    assert generate_replies(model, tokenizer, [conversation(text) for text in PROMPTS], generation) == alone
    monkeypatch.setattr("generation_utils.MAX_SLOTS", 2)
    assert generate_replies(model, tokenizer, [conversation(text) for text in PROMPTS], generation) == alone
    assert len(set(alone)) == 3


def test_a_batch_is_padded_on_the_left_and_the_padding_masked():
    batch = left_pad([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("decoder", [True, False])
def test_a_streamed_reply_is_the_reply(model, tokenizer, request, decoder):
    if not decoder:
        request.getfixturevalue("no_decoder")
    generation = build_generation_config(tokenizer, SETTINGS)
    expected = generate_replies(model, tokenizer, [conversation(PROMPTS[0])], generation)[0]
    stream = stream_reply(model, tokenizer, conversation(PROMPTS[0]), generation)
    chunks = list(stream)
    assert "".join(chunks).strip() == expected.text
    assert stream.reply == expected
    assert len(chunks) > 1


@pytest.mark.parametrize("form", ["[THINK]{}[/THINK]", "<|START_THINKING|>{}<|END_THINKING|>", "<think>\n{}\n</think>"])
@pytest.mark.parametrize("special", [True, False])
def test_marks_of_a_thought_are_text_of_a_reply_whatever_tokens_they_are(form, special):
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    marks = [mark.strip() for mark in form.split("{}")]
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in marks])
    text = form.format("It is a dog.") + "A dog."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    reply = read_reply(tokenizer, ids, {tokenizer.eos_token_id})
    assert all(mark in reply.text for mark in marks)
    assert without_thought(reply.text) == "A dog."
    assert reply.ended
    stream = Text(tokenizer)
    assert "".join([*map(stream.add, ids[:-1]), stream.finish()]).strip() == reply.text


def test_closing_a_stream_stops_the_model_and_its_thread(model, tokenizer, monkeypatch, no_decoder):
    forward, calls = model.forward, []
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    generation = build_generation_config(tokenizer, SETTINGS._replace(max_new_tokens=900))
    generation.eos_token_id = None
    stream = stream_reply(model, tokenizer, conversation(PROMPTS[0]), generation)
    next(stream)
    stream.close()
    assert len(calls) < 100
    assert not [thread for thread in threading.enumerate() if thread.name == "replies"]


@pytest.mark.parametrize("streamed", [False, True])
def test_replies_do_without_cudnns_attention_which_is_allowed_again_afterwards(
    model, tokenizer, monkeypatch, no_decoder, streamed
):
    seen, generate = [], model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda **options: seen.append(torch.backends.cuda.cudnn_sdp_enabled()) or generate(**options),
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    message, greedy = [{"role": "user", "content": "Hello"}], GenerationConfig(max_new_tokens=2, do_sample=False)
    if streamed:
        list(stream_reply(model, tokenizer, message, greedy))
    else:
        generate_replies(model, tokenizer, [message], greedy)
    assert seen == [False]
    assert before is torch.backends.cuda.cudnn_sdp_enabled() is True


def test_an_error_while_generating_reaches_the_caller(model, tokenizer, monkeypatch, no_decoder):
    monkeypatch.setattr(model, "generate", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream_reply(model, tokenizer, conversation("Hi"), build_generation_config(tokenizer, SETTINGS)))


def test_a_reply_ends_at_the_end_token_of_the_template_even_if_it_is_not_eos(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|reserved_0|>{{ m['content'] }}<|reserved_1|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|reserved_0|>{% endif %}"
    )
    ends = build_generation_config(tokenizer, SETTINGS).eos_token_id
    assert set(ends) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|reserved_1|>")}


def test_greedy_settings_carry_no_sampling_options(tokenizer):
    assert build_generation_config(tokenizer, SETTINGS).do_sample is False
    sampling = build_generation_config(tokenizer, SETTINGS._replace(do_sample=True, temperature=0.3, top_p=0.5))
    assert (sampling.do_sample, sampling.temperature, sampling.top_p) == (True, 0.3, 0.5)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain text,\ttabs\nand lines", "plain text,\ttabs\nand lines"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("title \x1b]0;owned\x07", "title ]0;owned"),
        ("back\x08\x08\rover", "backover"),
        ("eight-bit \x9b31m", "eight-bit 31m"),
        ("\u202etxt.exe\u202c \u2066a\u2069", "txt.exe a"),  # the direction of writing turned over
        ("é 你好 🙂", "é 你好 🙂"),
    ],
)
def test_control_sequences_in_a_reply_are_neutralised(raw, shown):
    assert printable(raw) == shown


def test_an_escape_sequence_split_over_chunks_is_neutralised_too():
    assert "\x1b" not in "".join(map(printable, ["\x1b", "[2J", "x"]))


def test_a_history_beyond_the_context_keeps_bos_and_its_newest_tokens(model):
    assert trim_history([1, 10, 11, 12, 13], 3, bos_id=1) == [1, 12, 13]
    assert trim_history([1, 10], 3, bos_id=1) == [1, 10]
    assert trim_history([9, 10, 11, 12], 2, bos_id=None) == [11, 12]
    assert trim_history([1, 10, 11, 1, 12], 3, bos_id=1) == [1, 12]
    assert prompt_limit(model, 24) == 1000
    assert prompt_limit(model, 5000) == 256


def test_a_prompt_longer_than_the_context_is_answered(model, tokenizer):
    generation = build_generation_config(tokenizer, SETTINGS)
    text = "word " * 3000
    assert len(encode_prompt(tokenizer, conversation(text))) > 1024
    assert isinstance(generate_replies(model, tokenizer, [conversation(text)], generation)[0].text, str)


def test_what_is_drawn_for_a_batch_does_not_depend_on_the_batches_before_it(model, no_decoder, monkeypatch):
    monkeypatch.setattr("generation_utils.MAX_SLOTS", 2)
    prompts = [[5, 6, 7], [8, 9], [4], [3]]
    sampled = GenerationConfig(do_sample=True, max_new_tokens=6, eos_token_id=2, pad_token_id=0)

    def replies(seed, prompts):
        torch.manual_seed(seed)
        return [list(group.values()) for group in write_replies(model, prompts, sampled)]

    first, second = replies(1, prompts)
    assert replies(1, prompts[2:]) == [second]
    assert replies(1, prompts) == [first, second]
    assert replies(2, prompts) != [first, second]
