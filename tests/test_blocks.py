"""engine_blocks: which modules count as one kind, which is tried once. Its kernels are tested in test_gpu.py."""

import pytest
import torch
from transformers import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm, Gemma3nTextMLP
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine_blocks import KeepLittle, kind_of, recipes


def mlp(sparsity):
    config = Gemma3nTextConfig(hidden_size=8, num_hidden_layers=2, activation_sparsity_pattern=[sparsity, 0.0])
    return Gemma3nTextMLP(config, layer_idx=0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LlamaRMSNorm(8, eps=1e-6), LlamaRMSNorm(8, eps=1e-5)),
        (LlamaRMSNorm(8), LlamaRMSNorm(8).requires_grad_(False)),
        (LlamaRMSNorm(8), LlamaRMSNorm(8).half()),
        (Gemma3nRMSNorm(8), Gemma3nRMSNorm(8, with_scale=False)),
        (mlp(0.5), mlp(0.0)),
    ],
)
def test_modules_of_one_class_that_compute_differently_are_of_different_kinds(one, other):
    assert kind_of(one) != kind_of(other)


def test_layers_that_differ_in_their_weights_alone_are_of_one_kind():
    assert kind_of(mlp(0.5)) == kind_of(mlp(0.5))
    norm = LlamaRMSNorm(8)
    norm.weight.data += 1
    assert kind_of(norm) == kind_of(LlamaRMSNorm(8))


def test_what_a_recipe_gives_is_computed_again_and_not_kept():
    x, computed = torch.randn(4, requires_grad=True), []
    with KeepLittle():
        out = 2 * x
        recipes[out] = lambda: computed.append(1) or 2 * x.detach()
        loss = (out * out).sum()
    del out
    assert not computed
    loss.backward()
    assert computed
    torch.testing.assert_close(x.grad, 8 * x.detach())
    del loss
    assert not len(recipes)
