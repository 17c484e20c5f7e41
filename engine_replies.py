"""Replies: rows that grow token by token in the slots of one cache; on a GPU a step is recorded once and replayed.

Everything here changes the speed of replies and nothing else: the tokens are those of transformers' generate, within
rounding. A model that it does not fit is found by trying, and transformers generates instead.
"""

from collections import deque, namedtuple
from functools import lru_cache
from types import MethodType
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AttentionInterface, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface

from engine_blocks import fuse_blocks
from engine_lora import FastLora, few_rows_linear, frozen_tensors
from engine_passes import VARLEN, Patches, probe_rows, transformers_model

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch, Windows or macOS
    triton = None

SLOTS = "slots"  # the name of the attention below, for transformers
MAX_SLOTS = 64
CHUNK = 8  # steps that are launched before the host reads the tokens of the steps before them
PREFILL_TOKENS = 8192  # of prompts that are computed in one pass
# How far a number format may move logits, as a share of their spread; in bfloat16 0.02 were seen, and at least 0.1
# where one of 24 tokens was lost, positions were off by one, or attention was scaled by 1.2
ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.1}

if triton:

    @triton.jit
    def _attend_kernel(
        query,
        keys,
        values,
        lengths,
        sums,
        maxima,
        totals,
        scale,
        softcap,
        window,
        capacity,
        HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,
        QUERIES: tl.constexpr,
        SPAN: tl.constexpr,
        SPLITS: tl.constexpr,
        BLOCK: tl.constexpr,
        CAPPED: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        # one program: the queries of one row that share a key head, against one part of the row's keys
        row, head, split = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
        length = tl.load(lengths + row).to(tl.int32) + 1  # the new token included
        first = tl.maximum(length - window, 0)
        part = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK) * BLOCK
        begin = first + split * part
        end = tl.minimum(begin + part, length)
        group, span = tl.arange(0, QUERIES), tl.arange(0, SPAN)
        heads = row * HEADS * GROUP + head * GROUP + group  # of the queries
        known = (group < GROUP)[:, None] & (span < WIDTH)[None, :]
        q = tl.load(query + heads[:, None] * WIDTH + span[None, :], mask=known, other=0.0)
        cached = (row * HEADS + head).to(tl.int64) * capacity
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        mean = tl.zeros([QUERIES, SPAN], tl.float32)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = (at < end)[:, None] & (span < WIDTH)[None, :]
            where = (cached + at)[:, None] * WIDTH + span[None, :]
            k = tl.load(keys + where, mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if CAPPED:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
            scores = tl.where((at < end)[None, :], scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, 1))
            shares = tl.exp(scores - larger[:, None])
            shrink = tl.exp(largest - larger)
            total = total * shrink + tl.sum(shares, 1)
            v = tl.load(values + where, mask=inside, other=0.0)
            mean = mean * shrink[:, None] + tl.dot(shares.to(v.dtype), v, input_precision=PRECISION)
            largest = larger
        out = heads * SPLITS + split
        tl.store(sums + out[:, None] * WIDTH + span[None, :], mean, mask=known)
        tl.store(maxima + out, largest, mask=group < GROUP)
        tl.store(totals + out, total, mask=group < GROUP)

    @triton.jit
    def _combine_kernel(
        sums, maxima, totals, out, WIDTH: tl.constexpr, SPAN: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr
    ):
        # one program: the parts of one query
        query, part, span = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, SPAN)
        known = part < SPLITS
        largest = tl.load(maxima + query * SPLITS + part, mask=known, other=float("-inf"))
        weight = tl.exp(largest - tl.max(largest, 0))
        total = tl.sum(weight * tl.load(totals + query * SPLITS + part, mask=known, other=0.0), 0)
        inside = known[:, None] & (span < WIDTH)[None, :]
        where = (query * SPLITS + part)[:, None] * WIDTH + span[None, :]
        mean = tl.sum(weight[:, None] * tl.load(sums + where, mask=inside, other=0.0), 0) / total
        tl.store(out + query * WIDTH + span, mean.to(out.dtype.element_ty), mask=span < WIDTH)

    @triton.jit
    def _store_kernel(
        key,
        value,
        keys,
        values,
        lengths,
        capacity,
        key_row,
        key_head,
        value_row,
        value_head,
        WIDTH: tl.constexpr,
        SPAN: tl.constexpr,
    ):
        row, head, span = tl.program_id(0), tl.program_id(1), tl.arange(0, SPAN)
        position = tl.load(lengths + row)
        at = ((row * tl.num_programs(1) + head).to(tl.int64) * capacity + position) * WIDTH + span
        inside = span < WIDTH
        tl.store(keys + at, tl.load(key + row * key_row + head * key_head + span, mask=inside), mask=inside)
        tl.store(values + at, tl.load(value + row * value_row + head * value_head + span, mask=inside), mask=inside)


# ---- The cache -------------------------------------------------------------------------------------------------------
class Slots(Cache):
    """Keys and values of rows that grow on their own, (slots, key heads, length, width) each a layer.

    lengths: tokens that each slot holds, (slots,). where: for the pass of new prompts, laid end to end, the slot and
    the position of each token, (tokens,) each; None in a step, which adds one token to each slot.
    """

    def __init__(self, layers, slots, length, device):
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.slots, self.length, self.where = slots, length, None
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.rows = torch.arange(slots, device=device)


class SlotLayer(CacheLayerMixin):
    """One layer of Slots. A prompt's pass gets its own keys and values back, a step those of the whole cache."""

    is_sliding = False

    def __init__(self, cache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states, value_states):
        shape = self.cache.slots, key_states.shape[1], self.cache.length
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cache.where is not None:
            slots, positions = self.cache.where
            self.keys[slots, :, positions] = key_states[0].transpose(0, 1)
            self.values[slots, :, positions] = value_states[0].transpose(0, 1)
            return key_states, value_states
        store(key_states, value_states, self.keys, self.values, self.cache)
        return self.keys, self.values

    def get_seq_length(self):
        return 0

    def get_mask_sizes(self, query_length):
        return query_length, 0

    def get_max_length(self):
        return self.cache.length


def store(key, value, keys, values, cache):
    """Put each slot's new key and value, (slots, heads, 1, width) each, where its row ends."""
    if key.is_cuda and triton and key.shape == value.shape and key.stride(-1) == value.stride(-1) == 1:
        slots, heads, _, width = key.shape
        strides = key.stride()[:2] + value.stride()[:2]
        span = triton.next_power_of_2(width)
        _store_kernel[(slots, heads)](
            key, value, keys, values, cache.lengths, keys.shape[2], *strides, WIDTH=width, SPAN=span, num_warps=1
        )
    else:
        keys[cache.rows, :, cache.lengths] = key[:, :, 0]
        values[cache.rows, :, cache.lengths] = value[:, :, 0]


# ---- Attention -------------------------------------------------------------------------------------------------------
def slot_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **kwargs
):
    """An attention function for transformers: each slot's new token against the tokens that the slot holds.

    query: (slots, heads, 1, width). key, value: (slots, key heads, length, width), the whole cache. cu_seq_lens_k: the
    tokens that each slot held before, (slots,). Returns (slots, 1, heads, width). Only the used part of the cache is
    read, and keys are not repeated for the queries that share them.
    """
    if unknown := [name for name in ("s_aux", "dropout") if kwargs.get(name)]:
        raise NotImplementedError(f"attention over slots without {unknown}")
    lengths, scaling = kwargs["cu_seq_lens_k"], query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and triton and key.shape == value.shape:
        return _attend(query, key, value, lengths, scaling, sliding_window, softcap), None
    if not query.is_cuda:  # a recorded step has one shape
        used = int(lengths.max()) + 1
        key, value = key[:, :, :used], value[:, :, :used]
    at = torch.arange(key.shape[2], device=key.device)
    seen = at <= lengths[:, None]
    if sliding_window is not None:
        seen &= at > lengths[:, None] - sliding_window
    if softcap is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen[:, None, None], scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2), None
    slots, heads, _, width = query.shape
    query = query.view(slots, key.shape[1], -1, width)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    shares = scores.float().masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).to(value.dtype)
    return (shares @ value).view(slots, 1, heads, -1), None


def _attend(query, key, value, lengths, scaling, window, softcap):
    slots, heads, _, width = query.shape
    key_heads, capacity = key.shape[1:3]
    query, span = query.contiguous(), max(16, triton.next_power_of_2(width))
    splits = max(1, min(16, 256 // (slots * key_heads)))
    sums = torch.empty(slots * heads, splits, width, dtype=torch.float32, device=query.device)
    maxima, totals = torch.empty(2, slots * heads, splits, dtype=torch.float32, device=query.device)
    _attend_kernel[(slots * key_heads, splits)](
        query,
        key,
        value,
        lengths,
        sums,
        maxima,
        totals,
        scaling,
        softcap or 1.0,
        window or 2**30,
        capacity,
        HEADS=key_heads,
        GROUP=heads // key_heads,
        WIDTH=width,
        QUERIES=max(16, triton.next_power_of_2(heads // key_heads)),
        SPAN=span,
        SPLITS=splits,
        BLOCK=32 if span > 128 else 64,
        CAPPED=softcap is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4,
    )
    out = query.new_empty(slots, 1, heads, width)
    parts = triton.next_power_of_2(splits)
    _combine_kernel[(slots * heads,)](
        sums, maxima, totals, out, WIDTH=width, SPAN=span, SPLITS=splits, PARTS=parts, num_warps=1
    )
    return out


AttentionInterface.register(SLOTS, slot_attention)
AttentionMaskInterface.register(SLOTS, lambda *args, **kwargs: None)


# ---- Fewer kernels a step --------------------------------------------------------------------------------------------
def simplify(base, patches):
    """Let norms, gates, rotations and 4-bit layers compute in one kernel each."""
    fuse_blocks(base, patches, trained=False)
    for module in base.modules():
        if isinstance(module, Linear4bit) and len(frozen_tensors(module) or []) > 1:
            patches.set(module, "forward", MethodType(frozen_forward, module))


def frozen_forward(layer, x):
    """The forward of a 4-bit layer by itself."""
    rows = x.reshape(-1, x.shape[-1])
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return few_rows_linear(rows, [(frozen_tensors(layer), bias, None, None)])[0].view(*x.shape[:-1], -1)


# ---- Decoding --------------------------------------------------------------------------------------------------------
# Models whose own logits a Decoder gave, and of each adapter_state: whether prompts may lie end to end, and which LoRA
# layers read the same tensor.
served = WeakKeyDictionary()
# Steps under way: their log of tokens, the event at which the host has it, and which rows had the slots.
Launched = namedtuple("Launched", "tokens event rows")


class Decoder:
    """Writes replies of a model as it is, with its adapter or without; close() takes back what is set on it.

    generation: a GenerationConfig, for how tokens are chosen. slots rows are computed together, of at most length
    tokens, prompt and reply. NotImplementedError, with the reason, where the model is not fit for this.
    """

    def __init__(self, model, generation, slots, length):
        self.model, self.base = model, transformers_model(model)
        if not has_slots(self.base):
            raise NotImplementedError("its layers keep more than a key and a value of each token")
        self.generation, self.slots, self.length = generation, slots, max(length, 32)  # the rows of the probe fit in
        device, self.on_gpu = self.base.device, self.base.device.type == "cuda"
        self.chunk = CHUNK if self.on_gpu else 1
        self.cache = Slots(self.base.config.get_text_config().num_hidden_layers, slots, self.length, device)
        self.tokens = torch.zeros(slots, 1, dtype=torch.long, device=device)
        self.log = torch.zeros(self.chunk, slots, dtype=torch.long, device=device)
        self.clock = torch.zeros(1, dtype=torch.long, device=device)
        self.warpers, self.patches = LogitsProcessorList(), Patches()
        self.seen = self.graph = self.replay = self.logits = self.draws = None
        if generation.do_sample:
            if device.type == "cpu":  # what is drawn for a row does not depend on those that are computed beside it
                self.draws = [torch.Generator() for _ in range(slots)]
            self.warpers.append(TemperatureLogitsWarper(generation.temperature))
            self.warpers.append(TopPLogitsWarper(generation.top_p))
        if generation.repetition_penalty not in (None, 1.0):
            words = self.base.get_output_embeddings().weight.shape[0]
            self.seen = torch.zeros(slots, words, dtype=torch.bool, device=device)
        self.packed = self.on_gpu and self.base.dtype != torch.float32
        self.patches.callback(model.train, model.training)
        model.eval()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self):
        if self.graph is not None:
            self.graph.reset()
        self.cache.layers.clear()  # its layers know it, so that its memory would wait for the garbage collector
        self.graph = self.replay = self.logits = None
        self.patches.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # ---- The model ----
    def _prepare(self):
        """Change the model for replies and record a step; the first time, see that it gives the model's own logits."""
        known, state = served.setdefault(self.model, {}), adapter_state(self.model)
        self.replay = self.step  # until one is recorded
        if state in known:
            self.packed, shared = known[state]
            self._change_model(None, shared)
            self._record([0] * self.slots)
            return
        rows = [row["input_ids"] for row in probe_rows(self.model)]
        plain = []

        def compute_once():
            with self._computing():
                plain.append(self.base(torch.tensor(rows).to(self.base.device), use_cache=False).logits)

        shared = self._change_model(compute_once)
        probes = [(ids[:length], logits) for ids, logits, length in zip(rows, plain[0], (24, 17), strict=True)]
        probes = probes[: self.slots]
        if self.packed and not self._serves(probes):
            self.packed = False
        if not self.packed and not self._serves(probes):
            raise NotImplementedError("its decoding steps do not give the model's own logits")
        self._record([ids[-1] for ids, _ in probes])
        known[state] = self.packed, shared

    def _change_model(self, compute_once, shared=None):
        """Let the model compute in fewer kernels; returns the LoRA layers that read the same tensor.

        compute_once, shared: as FastLora takes them. Without a GPU the model stays as it is, and computes once.
        """
        if self.on_gpu and triton:
            shared = FastLora(self.model, compute_once, self.patches, replying=True, shared=shared).shared
            simplify(self.base, self.patches)
        elif compute_once:
            compute_once()
        return shared

    def _serves(self, probes):
        """Whether prompts without their last two tokens, and then two steps, give the model's own logits.

        probes: token ids and the logits of their positions, (tokens, words) or more, for each slot or fewer.
        """
        try:
            self.begin({slot: ids[:-2] for slot, (ids, _) in enumerate(probes)})
            for back in (2, 1):
                found = self._step_with([ids[-back] for ids, _ in probes])
                if not self._agree(found, torch.stack([logits[len(ids) - back] for ids, logits in probes])):
                    return False
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001  whatever this way does not serve: head sizes, attention sinks, other caches
            return False
        return True

    def _step_with(self, tokens):
        """The logits of a step in which the first slots go on with these tokens."""
        self.tokens[: len(tokens), 0] = torch.tensor(tokens).to(self.tokens)
        self.clock.zero_()
        self.replay()
        return self.logits[: len(tokens)]

    def _agree(self, found, wanted):
        """Whether logits, (slots, words) each, are the same but for the rounding of the model's number format."""
        found, wanted = found.float(), wanted.float()
        spread = (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
        return bool(((found - wanted).norm(dim=-1) <= ROUNDING.get(self.base.dtype, 1e-3) * spread).all())

    def _record(self, tokens):
        """Record a step as a CUDA graph, and see that it does what a step with these tokens did, that comes before.

        The one before loads all that the step needs, which must not be loaded while it is recorded. Without a GPU each
        step is computed anew.
        """
        if not self.on_gpu:
            return
        wanted, graph, stream = self._step_with(tokens), torch.cuda.CUDAGraph(), recording_stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with self._computing(SLOTS), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what waits for the host, such as experts that are chosen there
            raise NotImplementedError(f"its decoding steps cannot be recorded ({type(error).__name__})") from error
        self.graph, self.replay = graph, graph.replay
        self.cache.lengths.sub_(1)
        if not self._agree(self._step_with(tokens), wanted):
            raise NotImplementedError("a recorded step does not do what the step did")

    def _computing(self, attention=None):
        """The context in which the model computes, without gradients, in half precision; with an attention's name."""
        patches, dtype = Patches(), self.base.dtype
        patches.enter_context(torch.no_grad())
        half = dtype in (torch.bfloat16, torch.float16)
        # casts that are kept would lie in the memory of a recorded step
        patches.enter_context(torch.autocast(self.base.device.type, dtype=dtype, enabled=half, cache_enabled=False))
        # cuDNN would prepare its attention anew, for tens of milliseconds, at each length
        patches.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
        torch.backends.cuda.enable_cudnn_sdp(False)
        if attention:
            patches.set(self.base.config, "_attn_implementation", attention)
        return patches

    # ---- Computing ----
    def begin(self, prompts):
        """Compute prompts {slot: token ids} into their slots; returns the first token of each reply, {slot: token}."""
        groups, room = [], 0
        for slot, ids in prompts.items():
            room -= len(ids)
            if not groups or not self.packed or room < 0:
                groups.append({})
                room = PREFILL_TOKENS - len(ids)
            groups[-1][slot] = ids
        first = {}
        for group in groups:
            first |= self._begin_together(group)
        return first

    def _begin_together(self, prompts):
        device, lengths = self.base.device, torch.tensor([len(ids) for ids in prompts.values()])
        slots, ends = torch.tensor(list(prompts)), lengths.cumsum(0)
        ids = torch.tensor([token for ids in prompts.values() for token in ids]).to(device)
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device)
        arguments = {}
        if self.packed:
            starts = torch.cat([ends.new_zeros(1), ends]).int().to(device)
            arguments = {"cu_seq_lens_q": starts, "max_length_q": int(lengths.max())}
        self.cache.where = slots.repeat_interleave(lengths).to(device), positions
        try:
            with self._computing(VARLEN if self.packed else None):
                logits = self.base(
                    input_ids=ids[None],
                    position_ids=positions[None],
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=(ends - 1).to(device),
                    **arguments,
                ).logits[0]
        finally:
            where, self.cache.where = self.cache.where, None
        slots = slots.to(device)
        if self.seen is not None:
            self.seen[slots] = False
            self.seen[where[0], ids] = True
        chosen = self._choose(logits, slots)
        self.tokens[slots], self.cache.lengths[slots] = chosen[:, None], lengths.to(device)
        return dict(zip(prompts, chosen.tolist(), strict=True))

    def step(self):
        """One more token for each slot, computed at once."""
        with self._computing(SLOTS):
            self._step()

    def _step(self):
        lengths = self.cache.lengths
        self.logits = self.base(
            input_ids=self.tokens,
            position_ids=lengths[:, None],
            past_key_values=self.cache,
            use_cache=True,
            cu_seq_lens_k=lengths,
        ).logits[:, -1]
        chosen = self._choose(self.logits, self.cache.rows)
        self.tokens.copy_(chosen[:, None])
        lengths.add_(1).clamp_(max=self.length - 1)  # a slot whose row has ended goes on until another gets it
        self.log.index_copy_(0, self.clock, chosen[None])
        self.clock.add_(1)

    @torch.no_grad()
    def _choose(self, logits, slots):
        """The next token of each row, (rows,), as transformers' generate chooses it; slots: the rows' own, (rows,)."""
        logits = logits.float()
        if self.seen is not None:
            penalty = self.generation.repetition_penalty
            lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.seen[slots], lowered, logits)
        if self.generation.do_sample:
            shares = self.warpers(None, logits).softmax(-1)
            chosen = (shares / self._noise(shares, slots)).argmax(-1)  # a draw by these shares
        else:
            chosen = logits.argmax(-1)
        if self.seen is not None:
            self.seen[slots, chosen] = True
        return chosen

    def _noise(self, shares, slots):
        """Exponential noise for the shares of each row, (rows, words), which belong to these slots."""
        noise = torch.empty_like(shares)
        if self.draws is None:
            return noise.exponential_()
        for row, slot in zip(noise, slots.tolist(), strict=True):
            row.exponential_(generator=self.draws[slot])
        return noise

    # ---- Rows ----
    def write(self, prompts, new_tokens, ends, seeds=None):
        """Yield (index of the prompt, some more of its reply's tokens, whether that was the last of it) as rows grow.

        prompts: token ids of each. A reply ends with one of the tokens `ends`, which is its last, or after new_tokens.
        seeds: of what is drawn for each reply on a CPU; None: they are drawn themselves.
        The longest prompts come first; rows that end make room for those that wait.
        """
        waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
        rows, under_way = {}, deque()  # rows: slot -> [index of the prompt, tokens that it may still have]

        def take(slot, tokens):
            row = rows[slot]
            count = next((number + 1 for number, token in enumerate(tokens) if token in ends), len(tokens))
            taken = tokens[: min(count, row[1])]
            row[1] -= len(taken)
            done = row[1] == 0 or taken[-1] in ends
            if done:
                del rows[slot]
            return row[0], taken, done

        while waiting or rows:
            free = [slot for slot in range(self.slots) if slot not in rows]
            if waiting and (not rows or len(free) >= self.slots // 4):
                chosen = {slot: waiting.popleft() for slot in free[: len(waiting)]}
                for slot, index in chosen.items() if self.draws else ():
                    self.draws[slot].manual_seed(seeds[index] if seeds else int(torch.randint(2**62, ())))
                first = self.begin({slot: prompts[index] for slot, index in chosen.items()})
                rows |= {slot: [index, new_tokens] for slot, index in chosen.items()}
                for slot, token in first.items():
                    yield take(slot, [token])
            if rows:
                under_way.append(self._launch(rows))
            # the host reads the tokens of a chunk while the next one is computed
            if under_way and (len(under_way) > self.on_gpu or not rows):
                launched = under_way.popleft()
                for slot, tokens in self._read(launched):
                    if rows.get(slot) is launched.rows[slot]:
                        yield take(slot, tokens)

    def _launch(self, rows):
        self.clock.zero_()
        for _ in range(self.chunk):
            self.replay()
        if not self.on_gpu:
            return Launched(self.log, None, dict(rows))
        tokens, event = torch.empty(self.log.shape, dtype=torch.long, pin_memory=True), torch.cuda.Event()
        tokens.copy_(self.log, non_blocking=True)
        event.record()
        return Launched(tokens, event, dict(rows))

    def _read(self, launched):
        if launched.event is not None:
            launched.event.synchronize()
        columns = launched.tokens.T.tolist()
        return [(slot, columns[slot]) for slot in launched.rows]


def adapter_state(model):
    """What decides how a model's adapter layers compute, beside their weights; equal where they compute alike."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return tuple((layer, layer.disable_adapters, layer.merged, tuple(layer.active_adapters)) for layer in layers)


@lru_cache
def recording_stream():
    """The stream on which all steps are recorded: for each stream cuBLAS takes memory that it never gives back."""
    return torch.cuda.Stream()


def has_slots(base):
    """Whether a model's layers keep keys and values of each token, and its positions do not depend on other rows'."""
    config = base.config.get_text_config()
    rope = str(getattr(config, "rope_parameters", ""))
    types = set(getattr(config, "layer_types", None) or ())
    if "'dynamic'" in rope or "'longrope'" in rope or types - {"full_attention", "sliding_attention"}:
        return False
    try:
        layers = StaticCache(config=config, max_cache_len=1).layers
    except Exception:  # noqa: BLE001  a kind of layer without a static cache
        return False
    return all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in layers)


def cache_bytes(base):
    """Bytes that a token's keys and values take in all layers, estimated from the config."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * base.dtype.itemsize
