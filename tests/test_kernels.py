"""The step's own kernels compute what bitsandbytes, peft and PyTorch do; here in their plain form, on a CPU."""

import contextlib
import copy
import weakref
from collections import Counter

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, Qwen2Config, Starcoder2Config
from transformers.modeling_layers import GradientCheckpointingLayer

import engine_lora
import engine_passes
from conftest import TINY_BASE
from engine_lora import FastLora, dequantize, frozen_tensors
from engine_passes import (
    LinearCrossEntropy,
    PassKernels,
    chosen_attention,
    decoder_layers,
    pass_losses,
    probe_backward,
    transformers_model,
)
from engine_runner import StepRunner, can_compile
from model_utils import attach_lora, build_quantization_config, load_base_model
from settings_utils import DEFAULTS, Settings

CPU = torch.device("cpu")
SETTINGS = Settings(**DEFAULTS)._replace(lora_r=4, lora_dropout=0.0, base_model_name=TINY_BASE)


def four_bit_layer(inputs=192, outputs=256, **options):
    layer = bnb.nn.Linear4bit(
        inputs, outputs, bias=False, **{"quant_type": "nf4", "compress_statistics": True} | options
    )
    return layer.to("cpu")


def tiny_model(four_bit=False, **changes):
    """The bundled base in float32 with an adapter whose B is not zero, so that every gradient is."""
    settings = SETTINGS._replace(use_4bit_quantization=four_bit, **changes)
    quantization = build_quantization_config(settings, torch.float32)
    model = attach_lora(load_base_model(TINY_BASE, CPU, torch.float32, quantization), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def some_rows(lengths=(5, 17, 9), vocabulary=8000):
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, vocabulary, (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]], "row": number} for number, ids in enumerate(rows)]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found, expected, tolerance=1e-5):
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


def plain_gradients(model, rows):
    pass_losses(model, rows)[0].sum().backward()
    found = gradients(model)
    model.zero_grad()
    return found


# ---- NF4 -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_weights_are_dequantized_to_bitsandbytes_bits(dtype):
    layer = four_bit_layer()
    state = layer.weight.quant_state
    state.dtype = dtype
    expected = bnb.functional.dequantize_4bit(layer.weight.data, state)
    found = dequantize(frozen_tensors(layer), torch.empty(256, 192, dtype=dtype))
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"quant_type": "fp4"}, {"compress_statistics": False}])
def test_weights_quantized_in_another_way_are_left_to_bitsandbytes(options):
    assert frozen_tensors(four_bit_layer(**options)) is None


# ---- LoRA ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_fused_lora_layers_have_pefts_losses_and_gradients(four_bit, checkpointing):
    model, rows = tiny_model(four_bit), some_rows()
    with torch.no_grad():
        expected_losses = pass_losses(model, rows)[0]
    expected = plain_gradients(model, rows)
    lora = FastLora(model)
    assert lora.covers_all
    assert [len(group.a) for group in lora.groups] == [3, 1, 2, 1] * len(transformers_model(model).get_decoder().layers)
    if checkpointing:
        StepRunner(model, checkpointing=True)
    losses = pass_losses(model, rows)[0]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    assert_same(gradients(model), expected, 3e-5)  # both are 5e-6 from float64's, since float32 rounds their sums apart


def test_layers_that_read_the_same_tensor_are_computed_together_and_others_alone():
    model, rows = tiny_model(lora_target_modules="q_proj,v_proj,up_proj,down_proj"), some_rows()
    layers = transformers_model(model).get_decoder().layers
    layers[0].self_attn.v_proj.scaling["default"] = 1.0
    expected = plain_gradients(model, rows)
    lora = FastLora(model)
    assert [len(group.a) for group in lora.groups] == [1, 1, 1, 1] + [2, 1, 1] * (len(layers) - 1)
    assert_same(plain_gradients(model, rows), expected, 3e-5)
    group, x = lora.groups[4], torch.randn(1, 7, 256)
    q, v = layers[1].self_attn.q_proj, layers[1].self_attn.v_proj
    together = q(x), v(x)
    assert group.waiting is None
    q(x)
    torch.testing.assert_close(v(2 * x), 2 * together[1])  # another tensor than the first of the group read
    assert group.waiting is None
    q(x)
    lora.forget()  # a pass broke off
    assert group.waiting is None


def test_the_fused_layers_add_their_biases():
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    base = AutoModelForCausalLM.from_config(Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2))
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model, rows = attach_lora(base, SETTINGS).train(), some_rows(vocabulary=300)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = plain_gradients(model, rows)
    lora = FastLora(model)
    assert [len(group.biases) for group in lora.groups] == [3, 0, 0, 0] * 2
    assert_same(plain_gradients(model, rows), expected, 3e-5)


def test_layers_of_two_decoder_layers_are_computed_apart(monkeypatch):
    class Block(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])

        def forward(self, x):  # all four read the same tensor
            return sum(layer(x) for block in self.blocks for layer in (block.first, block.second))

    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["first", "second"]))
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    monkeypatch.setattr(engine_lora, "probe_rows", lambda _: torch.randn(3, 8))
    monkeypatch.setattr(engine_lora, "probe_losses", lambda model, rows: model(rows))
    assert engine_lora.share_inputs(model, layers) == [layers[:2], layers[2:]]


def test_weights_that_stay_dequantized_give_the_same_bits():
    model, rows = tiny_model(four_bit=True), some_rows()
    FastLora(model)
    expected = plain_gradients(model, rows)
    transformers_model(model).pass_kernels = PassKernels()
    transformers_model(model).pass_kernels.fused_lora = True
    runner = StepRunner(model, dequantized=True)
    for _ in range(2):
        runner.begin()
        runner.run(model, rows, 1.0, torch.Tensor.backward)
        assert all(torch.equal(gradients(model)[name], gradient) for name, gradient in expected.items())
        assert {len(group.frozen) for group in runner.lora.groups} == {1, 2, 3}
    dequantized = [weakref.ref(weight) for group in runner.lora.groups for weight in group.frozen]
    runner.give_up_dequantized()
    assert not runner.dequantized
    assert all(group.frozen is group.stored for group in runner.lora.groups)
    assert not any(weight() is not None for weight in dequantized)


def test_a_base_with_dropout_of_its_own_is_recomputed_with_the_same_masks():
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}

    def gradient(checkpointing):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(Starcoder2Config(**shape, **heads, residual_dropout=0.3))
        base.pass_kernels = PassKernels()
        base.pass_kernels.fused_lora = True
        model = attach_lora(base, SETTINGS).train()
        runner = StepRunner(model, checkpointing=checkpointing)
        assert runner.lora.covers_all
        runner.begin()
        torch.manual_seed(1)
        runner.run(model, some_rows(vocabulary=300), 1.0, torch.Tensor.backward)
        return gradients(model)

    expected, found = gradient(False), gradient(True)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_compiled_layers_have_the_same_gradients():
    model, rows = tiny_model(), some_rows()
    expected = plain_gradients(model, rows)
    runner = StepRunner(model, checkpointing=True, compiled=True)
    runner.lora = FastLora(model)
    runner.begin()
    runner.run(model, rows, 1.0, torch.Tensor.backward)
    assert_same(gradients(model), expected, 1e-4)


def test_the_layers_multiply_with_the_adapter_as_the_optimizer_left_it():
    model, rows = tiny_model(), some_rows()
    lora = FastLora(model)
    before = pass_losses(model, rows)[0].detach()
    with torch.no_grad():
        for weight in lora.weights:
            weight.mul_(2)
    torch.testing.assert_close(pass_losses(model, rows)[0].detach(), before)
    lora.refresh()
    after = pass_losses(model, rows)[0].detach()
    assert (after - before).abs().max() > 0.01
    model.eval()  # then peft's own way computes, which must agree
    torch.testing.assert_close(pass_losses(model, rows)[0].detach(), after, rtol=1e-4, atol=1e-4)


def test_disabled_and_merged_adapters_and_dora_take_pefts_own_way():
    model, rows = tiny_model(), some_rows()
    with model.disable_adapter():
        expected = pass_losses(model, rows)[0].detach()
    FastLora(model)
    with model.disable_adapter():
        torch.testing.assert_close(pass_losses(model, rows)[0].detach(), expected)
    lora = FastLora(tiny_model(use_dora=True))
    assert not lora.covers_all
    assert not len(lora.seeds)


def test_only_models_whose_lora_layers_are_all_plain_are_compiled_unasked():
    for changes, expected in (({}, True), ({"use_dora": True}, False)):
        model = tiny_model(**changes)
        assert not can_compile(model)
        transformers_model(model).pass_kernels = PassKernels()
        transformers_model(model).pass_kernels.fused_lora = True
        assert can_compile(model) is expected


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    x = torch.ones(200, 500)
    dropped = engine_lora.drop(x, torch.tensor([3]), 0.25)
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean() == pytest.approx(1, abs=0.01)
    assert dropped.max() == pytest.approx(1 / 0.75)
    assert torch.equal(dropped, engine_lora.drop(x, torch.tensor([3]), 0.25))
    assert not torch.equal(dropped, engine_lora.drop(x, torch.tensor([4]), 0.25))


def test_the_gradient_goes_through_the_same_dropout_as_the_loss():
    torch.manual_seed(0)
    x, weight, seed = torch.randn(40, 64, requires_grad=True), torch.randn(32, 64), torch.tensor([7])
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    mask = engine_lora.drop(torch.ones(40, 64), seed, 0.3)
    expected = x @ weight.T + 2.0 * ((x * mask) @ a.T) @ b.T
    wanted = torch.autograd.grad(expected.pow(2).sum(), (x, a, b))
    (out,), _ = torch.ops.lora.linear(x, [a], [b], 2 * a.detach(), [b.detach()], [], seed, 0.3, 2.0, [weight])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    for found, gradient in zip(torch.autograd.grad(out.pow(2).sum(), (x, a, b)), wanted, strict=True):
        assert (found - gradient).norm() <= 1e-5 * gradient.norm()


def test_each_pass_draws_other_masks_and_a_seed_draws_them_again():
    model = tiny_model(lora_dropout=0.5)
    lora, rows = FastLora(model), some_rows()
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        lora.draw_dropout()
        assert len(lora.seeds.unique()) == len(lora.seeds)
        losses.append(pass_losses(model, rows)[0].detach())
    assert torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], losses[1])


def test_kernels_that_do_not_run_are_left_out_with_a_line(monkeypatch, capsys):
    assert engine_lora.try_lora(CPU, torch.bfloat16)
    assert capsys.readouterr().err == ""

    def fail(*_):
        raise OSError("no compiler")

    monkeypatch.setattr(engine_lora, "drop", fail)
    assert not engine_lora.try_lora(CPU, torch.bfloat16)
    assert "The fused LoRA kernels do not serve here (OSError)" in capsys.readouterr().err


def test_kernels_that_compute_something_else_are_left_out_with_a_line(monkeypatch, capsys):
    original = engine_lora.matmul32
    monkeypatch.setattr(engine_lora, "matmul32", lambda *operands: original(*operands) * 1.2)
    assert not engine_lora.try_lora(CPU, torch.bfloat16)
    assert "The fused LoRA kernels do not serve here (wrong)" in capsys.readouterr().err


def test_memory_that_runs_out_inside_a_group_of_layers_leaves_nothing_alive():
    model = tiny_model()
    base = transformers_model(model)
    base.pass_kernels = PassKernels()
    base.pass_kernels.fused_lora = True
    runner, layers, read = StepRunner(model), base.get_decoder().layers, []

    def fail(*_):
        raise torch.OutOfMemoryError("fake")

    layers[-1].mlp.act_fn.register_forward_hook(fail)  # between gate and up
    layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: read.append(weakref.ref(inputs[0])))
    runner.begin()
    with contextlib.suppress(torch.OutOfMemoryError):
        runner.run(model, some_rows(), 1.0, torch.Tensor.backward)
    assert any(group.waiting for group in runner.lora.groups)
    runner.release()
    assert read[0]() is None
    layers[1].mlp.gate_proj(torch.randn(1, 3, 256))
    assert any(group.waiting for group in runner.lora.groups)
    runner.begin()
    assert not any(group.waiting for group in runner.lora.groups)


def test_a_kernel_is_tried_backwards_too_without_a_trace():
    model, rows = tiny_model(use_dora=True), some_rows()
    calls, layers = Counter(), decoder_layers(model)
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, inputs: calls.update([layer]))
        layer.self_attn.register_forward_pre_hook(lambda module, inputs: calls.update([module]))
    assert probe_backward(model, rows)
    assert all(parameter.grad is None for parameter in model.parameters())
    # each layer is computed again, since DoRA's would all keep a whole weight otherwise
    assert [(calls[layer], calls[layer.self_attn]) for layer in layers] == [(1, 2)] * len(layers)
    assert not any("forward" in vars(layer) for layer in layers)
    layers[0].forward = own = layers[0].forward
    norm = transformers_model(model).get_decoder().norm
    norm.register_forward_hook(lambda module, inputs, out: NanBackwards.apply(out))
    assert not probe_backward(model, rows)
    assert vars(layers[0])["forward"] is own
    model.requires_grad_(False)
    assert probe_backward(model, rows)  # nothing is trained, nothing is tried


def test_a_kernel_is_tried_backwards_with_the_attention_that_was_chosen(monkeypatch):
    monkeypatch.setattr(engine_passes, "varlen_attn", lambda query, *_, **__: query)  # the true one needs a GPU
    model, seen = tiny_model(), []
    base = transformers_model(model)
    base.pass_kernels = PassKernels()
    base.pass_kernels.varlen = True
    for layer in decoder_layers(model):
        layer.self_attn.register_forward_pre_hook(lambda *_: seen.append(base.config._attn_implementation))
    assert probe_backward(model, some_rows())
    assert seen == [engine_passes.VARLEN] * 2 * len(decoder_layers(model))  # forward, and again in the backward pass


class NanBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


# ---- Loss ------------------------------------------------------------------------------------------------------------
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
    model, rows = tiny_model(), some_rows()
    expected_losses, expected = pass_losses(model, rows)[0].detach(), plain_gradients(model, rows)
    base = transformers_model(model)
    base.pass_kernels = PassKernels()
    base.pass_kernels.fused_loss = True
    torch.testing.assert_close(pass_losses(model, rows)[0].detach(), expected_losses)
    assert_same(plain_gradients(model, rows), expected)
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, base.config.vocab_size)


def test_an_adapter_of_the_output_layer_computes_as_the_others_before_and_after_a_pass():
    model = tiny_model(lora_target_modules="q_proj,lm_head")
    lora, head = FastLora(model), transformers_model(model).get_output_embeddings()
    assert lora.covers_all
    assert len(lora.seeds) > 1
    for _ in range(2):
        assert "forward" in vars(head)
        pass_losses(model, some_rows())


def test_attention_is_the_models_own_again_after_a_pass():
    base = copy.deepcopy(transformers_model(tiny_model()))
    usual = base.config._attn_implementation
    base.pass_kernels = PassKernels()
    base.pass_kernels.varlen = True
    with chosen_attention(base):
        assert base.config._attn_implementation == engine_passes.VARLEN != usual
    assert base.config._attn_implementation == usual


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
