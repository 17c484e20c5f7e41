"""The decoder: greedy tokens are those of transformers' generate, sampled ones have the same distribution."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GenerationConfig, MixtralConfig

from engine_replies import Decoder, has_slots
from tiny import CONFIGS, TINY

FAMILIES = CONFIGS | {
    "gemma 3": Gemma3TextConfig(**TINY, head_dim=8, sliding_window=7, query_pre_attn_scalar=8),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
}
GREEDY = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=0)


def tiny(name):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name])).eval()


def make_prompts(lengths=(3, 21, 9, 14, 1), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=draw).tolist() for length in lengths]


def generated(model, prompt, generation, ends=()):
    """What transformers' generate writes after one prompt by itself."""
    ids = torch.tensor([prompt])
    generation = copy.deepcopy(generation)
    generation.eos_token_id = list(ends) or None
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
