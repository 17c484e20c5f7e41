"""The decoder: greedy tokens are those of transformers' generate, sampled ones have the same distribution."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    Llama4TextConfig,
    MambaConfig,
    MixtralConfig,
)

import engine_replies
import generation_utils
from conftest import TINY_BASE
from engine_replies import SLOTS, Decoder, has_slots, slot_attention, store
from tiny import CONFIGS, TINY, make_model, state_of

FAMILIES = CONFIGS | {
    "gemma 3": Gemma3TextConfig(**TINY, head_dim=8, sliding_window=7, query_pre_attn_scalar=8),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
}
GREEDY = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=0)


def tiny(name):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name])).eval()


def joined(groups):
    """One dict of write_replies' groups."""
    return {index: ids for group in groups for index, ids in group.items()}


def make_prompts(lengths=(3, 21, 9, 14, 1), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=draw).tolist() for length in lengths]


def generated(model, prompt, generation, ends=()):
    """What transformers' generate writes after one prompt by itself."""
    ids = torch.tensor([prompt]).to(model.device)
    generation = copy.deepcopy(generation)
    generation.eos_token_id = list(ends) or [-1]
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)[0, len(prompt) :]


def written(model, prompts, generation, slots=2, ends=(), length=64):
    replies = [[] for _ in prompts]
    with Decoder(model, generation, slots, length) as decoder:
        for index, tokens, done in decoder.write(prompts, generation.max_new_tokens, set(ends)):
            replies[index] += tokens
            assert done == (len(replies[index]) == generation.max_new_tokens or tokens[-1] in ends)
    return replies


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_generate(name):
    model, prompts = tiny(name), make_prompts()
    assert has_slots(model)
    expected = [generated(model, prompt, GREEDY).tolist() for prompt in prompts]
    assert written(model, prompts, GREEDY) == expected
    assert len({tuple(reply) for reply in expected}) > 1


def test_a_reply_ends_at_a_stop_token_and_its_slot_is_given_to_the_next_prompt():
    model, prompts = tiny("llama"), make_prompts((3, 21, 9, 14, 1, 8, 8))
    ends = {generated(model, prompts[0], GREEDY)[4].item(), generated(model, prompts[3], GREEDY)[9].item()}
    expected = [generated(model, prompt, GREEDY, ends).tolist() for prompt in prompts]
    for slots in (1, 3):
        assert written(model, prompts, GREEDY, slots, ends) == expected
    assert min(map(len, expected)) < 20 == max(map(len, expected))


def test_repetition_is_penalised_as_generate_does():
    model, prompts = tiny("mistral"), make_prompts()
    generation = GenerationConfig(max_new_tokens=20, do_sample=False, repetition_penalty=1.7, pad_token_id=0)
    expected = [generated(model, prompt, generation).tolist() for prompt in prompts]
    assert written(model, prompts, generation) == expected
    assert expected != [generated(model, prompt, GREEDY).tolist() for prompt in prompts]


def test_sampled_tokens_have_the_distribution_of_generate():
    model, prompt = tiny("llama"), make_prompts((9,))[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(12)  # a few likely tokens, some of which top_p leaves out
    generation = GenerationConfig(
        max_new_tokens=1, do_sample=True, temperature=0.8, top_p=0.7, top_k=0, eos_token_id=None, pad_token_id=0
    )
    draws = 3000
    torch.manual_seed(0)
    ids = torch.tensor([prompt] * draws)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)[:, -1]
    with Decoder(model, generation, 64, 16) as decoder:
        found = [tokens[0] for _, tokens, _ in decoder.write([prompt] * draws, 1, set())]
    theirs = torch.bincount(theirs, minlength=300) / draws
    ours = torch.bincount(torch.tensor(found), minlength=300) / draws
    assert 2 <= (theirs > 0).sum() < 100
    assert ((theirs > 0.01) == (ours > 0.01))[theirs > 0.02].all()
    assert (theirs - ours).abs().sum() < 0.1


def test_what_is_drawn_for_a_row_depends_on_its_number_and_not_on_the_rows_beside_it():
    model, prompts = tiny("llama"), make_prompts((9, 21, 3, 9, 14))
    prompts[3] = prompts[0]
    generation = GenerationConfig(
        max_new_tokens=12, do_sample=True, temperature=1.0, top_p=0.9, top_k=0, eos_token_id=[], pad_token_id=0
    )

    def draw(numbers):
        torch.manual_seed(0)
        chosen = [prompts[number] for number in numbers]
        replies = joined(generation_utils.write_replies(model, chosen, generation, numbers))
        return {number: replies[index] for index, number in enumerate(numbers)}

    replies = draw([0, 1, 2, 3, 4])
    assert replies[0] != replies[3]  # the same question again gets another answer
    some = draw([4, 1, 3])
    assert some == {number: replies[number] for number in some}


def test_the_model_is_as_it_was_and_random_numbers_are_left_alone():
    model = make_model("qwen3")  # in training mode
    before = {name: (id(module), set(vars(module))) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    written(model, make_prompts((5, 8)), GREEDY)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert before == {name: (id(module), set(vars(module))) for name, module in model.named_modules()}


def test_the_cache_goes_with_its_decoder_and_not_with_the_garbage():
    model = tiny("llama")
    gc.disable()
    try:
        with Decoder(model, GREEDY, 2, 64) as decoder:
            keys = weakref.ref(decoder.cache.layers[0].keys)
            assert keys() is not None
        assert keys() is None
    finally:
        gc.enable()


def tuned_model():
    """A model whose adapter changes what it writes."""
    model = make_model("mistral").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(10)
    return model


def test_an_adapter_is_used_where_it_is_switched_on():
    model, prompts = tuned_model(), make_prompts((5, 8))
    tuned = written(model, prompts, GREEDY)
    assert tuned == [generated(model, prompt, GREEDY).tolist() for prompt in prompts]
    with model.disable_adapter():
        base = written(model, prompts, GREEDY)
        assert base == [generated(model, prompt, GREEDY).tolist() for prompt in prompts]
    assert base != tuned


def by_turns(model, prompt):
    """What model and base write after a prompt, three steps of each at a time, and again after that."""
    decoders, found = generation_utils.Decoders(), []
    for _ in range(2):
        replies, writing = ([], []), []
        for switch in (model.enable_adapter_layers, model.disable_adapter_layers):
            switch()
            writing.append(decoders.get(model, GREEDY, 40).write([prompt], GREEDY.max_new_tokens, set()))
        while len(replies[1]) < GREEDY.max_new_tokens:
            for switch, reply, steps in zip(
                (model.enable_adapter_layers, model.disable_adapter_layers), replies, writing, strict=True
            ):
                switch()
                for _, tokens, _ in itertools.islice(steps, 3):
                    reply += tokens
        found.append(replies)
    decoders.close()
    model.enable_adapter_layers()
    assert found[0] == found[1]
    return found[0]


def test_replies_of_model_and_base_can_be_written_by_turns():
    model, [prompt] = tuned_model(), make_prompts((8,))
    before = state_of(model)
    tuned, base = by_turns(model, prompt)
    assert state_of(model) == before
    assert tuned == generated(model, prompt, GREEDY).tolist() != base
    with model.disable_adapter():
        assert base == generated(model, prompt, GREEDY).tolist()


def test_out_of_memory_halves_the_rows_and_goes_on(monkeypatch, capsys):
    model, prompts, begun = tiny("llama"), make_prompts((3, 5, 4, 2, 6)), []
    begin = Decoder.begin

    def fail_beyond_one(decoder, wanted):
        if decoder.slots > 1 and begun:
            raise torch.OutOfMemoryError
        begun.append(decoder.slots)
        return begin(decoder, wanted)

    monkeypatch.setattr(generation_utils, "MAX_SLOTS", 2)
    expected = joined(generation_utils.write_replies(model, prompts, GREEDY))
    monkeypatch.setattr(Decoder, "begin", fail_beyond_one)
    for used in (model, model, tiny("llama")):  # while rows are written, before the first, while the model is tried
        assert joined(generation_utils.write_replies(used, prompts, GREEDY)) == expected
        assert "Out of memory in replies; going on with 1 at once" in capsys.readouterr().err
    assert begun.count(2) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_that_is_slightly_wrong_is_found(dtype, monkeypatch):
    def decode():
        Decoder(AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=dtype), GREEDY, 2, 64).close()

    def lose_one(key, value, keys, values, cache):
        store(key, value, keys, values, cache)
        values[:, :, 3] = 0

    def scale(module, query, *others, **options):
        return slot_attention(module, query, *others, **options | {"scaling": 1.2 * query.shape[-1] ** -0.5})

    decode()
    with monkeypatch.context() as patch:
        patch.setattr(engine_replies, "store", lose_one)
        with pytest.raises(NotImplementedError, match="own logits"):
            decode()
    AttentionInterface.register(SLOTS, scale)
    try:
        with pytest.raises(NotImplementedError, match="own logits"):
            decode()
    finally:
        AttentionInterface.register(SLOTS, slot_attention)


def test_a_model_is_tried_once_for_each_state_of_its_adapter(monkeypatch):
    model, prompts, tried = tuned_model(), make_prompts((3, 5)), []
    serves = Decoder._serves
    monkeypatch.setattr(Decoder, "_serves", lambda *arguments: tried.append(1) or serves(*arguments))
    tuned = written(model, prompts, GREEDY)
    with model.disable_adapter():
        base = written(model, prompts, GREEDY)
    count = len(tried)
    assert written(model, prompts, GREEDY, slots=1) == tuned != base
    with model.disable_adapter():
        assert written(model, prompts, GREEDY) == base
    assert len(tried) == count > 0


@pytest.mark.parametrize("config", [MambaConfig, Llama4TextConfig])
def test_other_caches_are_left_to_generate_which_is_said(config, capsys):
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    more = {} if config is MambaConfig else {"attention_chunk_size": 8} | TINY | {"num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(config(**sizes | more)).eval()
    generation_utils.say_slower.cache_clear()
    found = joined(generation_utils.write_replies(model, make_prompts((4, 6)), GREEDY))
    assert [len(found[index]) for index in (0, 1)] == [20, 20]
    assert "Replies are written by transformers' generate, which is slower" in capsys.readouterr().err


def test_no_prompts_have_no_replies():
    assert list(generation_utils.write_replies(tiny("llama"), [], GREEDY)) == []
