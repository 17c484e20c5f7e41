"""Passes: the fused loss, the attention over rows end to end, and how a kernel is tried."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import engine_passes
from engine_passes import (
    PLAIN,
    Kernels,
    LinearCrossEntropy,
    chosen_attention,
    cost_of,
    cut_step,
    decoder_layers,
    pack_rows,
    pass_losses,
    probe_backward,
    recorded_tokens,
    transformers_model,
)
from engine_runner import StepRunner
from plan_utils import StepPlan
from tiny import (
    SETTINGS,
    assert_same,
    bundled_model,
    fast_lora,
    gradients,
    make_model,
    make_rows,
    plain_gradients,
    some_rows,
)


def test_a_kernel_is_tried_backwards_too_without_a_trace():
    model, rows = bundled_model(use_dora=True), some_rows()
    calls, layers = Counter(), decoder_layers(model)
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, inputs: calls.update([layer]))
        layer.self_attn.register_forward_pre_hook(lambda module, inputs: calls.update([module]))
    assert probe_backward(model, rows, engine_passes.PLAIN)
    assert all(parameter.grad is None for parameter in model.parameters())
    # each layer is computed again, since DoRA's would all keep a whole weight otherwise
    assert [(calls[layer], calls[layer.self_attn]) for layer in layers] == [(1, 2)] * len(layers)
    assert not any("forward" in vars(layer) for layer in layers)
    layers[0].forward = own = layers[0].forward
    norm = transformers_model(model).get_decoder().norm
    norm.register_forward_hook(lambda module, inputs, out: NanBackwards.apply(out))
    assert not probe_backward(model, rows, engine_passes.PLAIN)
    assert vars(layers[0])["forward"] is own
    model.requires_grad_(False)
    assert probe_backward(model, rows, engine_passes.PLAIN)  # nothing is trained, nothing is tried


def test_a_kernel_is_tried_backwards_with_the_attention_that_was_chosen(monkeypatch):
    monkeypatch.setattr(engine_passes, "varlen_attn", lambda query, *_, **__: query)  # the true one needs a GPU
    model, seen = bundled_model(), []
    base = transformers_model(model)
    for layer in decoder_layers(model):
        layer.self_attn.register_forward_pre_hook(lambda *_: seen.append(base.config._attn_implementation))
    assert probe_backward(model, some_rows(), Kernels(attention=True))
    assert seen == [engine_passes.VARLEN] * 2 * len(decoder_layers(model))  # forward, and again in the backward pass


class NanBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


def test_the_fused_loss_takes_float32_hidden_states_from_autocast():
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(33, 16).bfloat16()
    targets = torch.randint(33, (7,))
    with torch.autocast("cpu", torch.bfloat16):
        losses = LinearCrossEntropy.apply(hidden, weight, targets)
    expected = F.cross_entropy(hidden @ weight.float().T, targets, reduction="none")
    (wanted,) = torch.autograd.grad(expected.sum(), hidden, retain_graph=True)
    (found,) = torch.autograd.grad(losses.sum(), hidden)
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("tokens", [1, 7, 8, 50])
def test_the_fused_loss_is_the_cross_entropy_of_the_output_layer(tokens, monkeypatch):
    monkeypatch.setattr(LinearCrossEntropy, "LOGITS", 800)  # of 100 words: eight tokens
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 16, requires_grad=True), torch.randn(100, 16)
    targets, share = torch.randint(100, (tokens,)), torch.rand(tokens)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (wanted,) = torch.autograd.grad((expected * share).sum(), hidden)
    losses = LinearCrossEntropy.apply(hidden, weight, targets)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(torch.autograd.grad((losses * share).sum(), hidden)[0], wanted)


def test_the_model_computes_the_fused_loss_and_afterwards_logits_again():
    model, rows = bundled_model(), some_rows()
    expected_losses, expected = pass_losses(model, rows)[0].detach(), plain_gradients(model, rows)
    base = transformers_model(model)
    torch.testing.assert_close(pass_losses(model, rows, Kernels(loss=True))[0].detach(), expected_losses)
    assert_same(plain_gradients(model, rows, Kernels(loss=True)), expected)
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, base.config.vocab_size)


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is computed meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_iter(found) if torch.is_tensor(t))])
        return found


def test_the_logits_of_a_long_row_are_never_whole(monkeypatch):
    chunk, tokens, words = 2**16, 1024, 300
    monkeypatch.setattr(LinearCrossEntropy, "LOGITS", chunk)
    rows = make_rows((tokens, 5, 40), vocabulary=words)
    rows[0]["labels"] = rows[0]["input_ids"]
    whole, found = tokens * words, []
    for kernels in (PLAIN, Kernels(loss=True)):
        model = make_model("llama")
        plan = StepPlan(kernels, checkpointing=True, max_pass_tokens=64, longest_row=tokens)
        with StepRunner(model, plan) as runner, LargestTensor() as largest:
            assert runner.plan.kernels == kernels
            loss = runner.step(rows)
            found.append((loss.item(), gradients(model), largest.numbers))
    (expected, wanted, most), (loss, grads, fewer) = found
    assert fewer <= chunk < whole / 4 < most
    assert loss == pytest.approx(expected, abs=1e-6)
    assert_same(grads, wanted)


def test_an_adapter_of_the_output_layer_computes_as_the_others_before_and_after_a_pass():
    model = make_model("llama", settings=SETTINGS._replace(lora_target_modules="q_proj,lm_head"))
    lora, head = fast_lora(model), transformers_model(model).get_output_embeddings()
    assert lora.covers_all
    assert len(lora.seeds) > 1
    for _ in range(2):
        assert "forward" in vars(head)
        pass_losses(model, make_rows(), Kernels(loss=True))


def test_attention_is_the_models_own_again_after_a_pass():
    base = copy.deepcopy(transformers_model(bundled_model()))
    usual = base.config._attn_implementation
    with chosen_attention(base, Kernels(attention=True)):
        assert base.config._attn_implementation == engine_passes.VARLEN != usual
    assert base.config._attn_implementation == usual


def test_a_step_is_cut_into_passes_that_fill_recorded_lengths_well():
    draw, usual, found = np.random.default_rng(0), 0, 0
    for lengths in ((512,), (1152, 1408, 2048), (1536, 1920), (896, 1792)):
        for rows in (1, 3, 16, 60):
            step = draw.integers(5, 512, rows).tolist()
            groups = cut_step(step, lengths[-1], lengths)
            assert sorted(index for group in groups for index in group) == list(range(rows))
            filled = [
                [recorded_tokens(sum(step[index] for index in group), lengths) for group in cut]
                for cut in (groups, pack_rows(step, lengths[-1]))
            ]
            assert set(filled[0]) <= set(lengths)
            assert cost_of(filled[0]) <= cost_of(filled[1])
            found, usual = found + cost_of(filled[0]), usual + cost_of(filled[1])
    assert found < usual
    # 1,600 tokens: two passes of 768 and 896, not one of 1,536 and a rest
    assert sorted(len(group) for group in cut_step([100] * 16, 1536, (768, 896, 1536))) == [8, 8]


def test_a_row_longer_than_all_recorded_lengths_is_a_pass_of_its_own():
    assert cut_step([300, 2000, 100], 1024, (512, 1024)) == [[1], [0, 2]]


def test_varlen_attention_takes_what_autocast_would_take_for_it(monkeypatch):
    seen = []
    monkeypatch.setattr(engine_passes, "varlen_attn", lambda q, k, v, *_, **__: seen.extend((q, k, v)) or q)
    states, starts = torch.zeros(1, 2, 3, 8), {"cu_seq_lens_q": None, "max_length_q": 3}
    engine_passes.varlen_attention(None, states, states, states, None, **starts)
    with torch.autocast("cpu", torch.bfloat16):
        engine_passes.varlen_attention(None, states, states, states, None, **starts)
    assert [tensor.dtype for tensor in seen] == [torch.float32] * 3 + [torch.bfloat16] * 3


@pytest.mark.parametrize("window", [None, 16])
def test_varlen_attention_calls_the_installed_torch_as_it_wants_to_be_called(window, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know the device meta
    query = torch.empty(1, 8, 40, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key, value = (torch.empty_like(query[:, :2], requires_grad=True) for _ in range(2))
    starts = torch.empty(4, dtype=torch.int32, device="meta")
    windows, original = [], engine_passes.varlen_attn
    monkeypatch.setattr(
        engine_passes,
        "varlen_attn",
        lambda *args, **options: windows.append(options["window_size"]) or original(*args, **options),
    )
    out, _ = engine_passes.varlen_attention(
        None, query, key, value, None, sliding_window=window, cu_seq_lens_q=starts, max_length_q=20
    )
    out.sum().backward()
    assert out.shape == (1, 40, 8, 64)
    assert windows == [(-1, 0) if window is None else (15, 0)]  # a token sees itself and 15 before it
    assert [states.grad.shape for states in (query, key, value)] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize("option", ["softcap", "s_aux", "dropout"])
def test_varlen_attention_refuses_what_it_would_leave_out(option):
    states = torch.zeros(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match=option):
        engine_passes.varlen_attention(None, states, states, states, None, **{option: 0.5})
