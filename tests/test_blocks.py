"""engine_blocks: which modules count as one kind, which is tried once. Its kernels are tested in test_gpu.py."""

import pytest
import torch
from transformers import Gemma3nTextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm, Gemma3nTextMLP
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import engine_blocks
from engine_blocks import KeepLittle, fused_norm, kind_of, recipes

NORMS = [LlamaRMSNorm, Gemma3RMSNorm, Gemma3nRMSNorm, Olmo2RMSNorm]


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


def rounded_otherwise(kind, device, trained):
    """The share of the numbers that the fused forward of a kind of norm gives otherwise than the module, in 16 bits."""
    draw = torch.Generator().manual_seed(2)
    norm = kind(96).to(device, torch.bfloat16).requires_grad_(False)
    norm.weight.copy_(0.3 * torch.randn(96, generator=draw) + 1)
    x = torch.randn(20, 96, generator=draw).to(norm.weight)
    return (fused_norm(norm, trained)(norm, x) != norm(x)).float().mean()


def norm_by_pytorch(x, weight, eps, more, once):
    value = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    value = value if once else value.to(x.dtype).float()
    return (value * (weight.float() + more)).to(x.dtype)


@pytest.mark.parametrize("kind", NORMS)
def test_a_fused_norm_rounds_where_the_models_own_does(kind, monkeypatch):
    monkeypatch.setattr(engine_blocks, "norm", norm_by_pytorch)  # in place of the kernel, which needs a GPU
    assert rounded_otherwise(kind, "cpu", trained=False) < 0.02
    monkeypatch.setattr(engine_blocks, "norm", lambda *known: norm_by_pytorch(*known[:-1], kind is LlamaRMSNorm))
    assert rounded_otherwise(kind, "cpu", trained=False) > 0.1  # the check can tell
