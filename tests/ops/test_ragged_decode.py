"""Decode kernel over heads of unequal length against plain softmax attention in float32.

On a CUDA device the compiled kernel is tested. Elsewhere the same tests run once more in a process of their own, in
triton's interpreter, which must be chosen before triton is loaded; they are small because it is slow. The interpreter
runs one program after the other: only a GPU tells whether the merge of partial results is free of races.
"""

import math

import pytest
import torch

from benchmarks.decode import Layer, Shape
from kvcompress.cache import fused_decode
from kvcompress.core.retention import Retention
from kvcompress.ops import ragged_decode
from kvcompress.ops.ragged_decode import GroupSlots, Tuning, can_decode, table_of
from tests.cache.cache_tools import compressor_for, feed, model_of, padded, tokens
from tests.ops.triton_tools import CUDA, DEVICE, needs_cuda, needs_triton, only_where_interpreted, run_interpreted

# The interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3 if CUDA else 8e-3}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POISON = float("nan")


@only_where_interpreted
def test_these_tests_pass_in_tritons_interpreter():
    run_interpreted(__file__)


def make(batch, lengths, group, size, value_size, dtype, spare=5, same_block=False):
    """A query, groups whose unused slots are poisoned, and the reference `[batch, query_head, value_size]`.

    Every head is a group, or all heads are one if they are equally long.
    """
    query = torch.randn(batch, len(lengths) * group, size, device=DEVICE).to(dtype)
    blocks = []
    for width in (size, value_size):
        block = torch.full((batch, len(lengths), max(lengths) + spare, width), POISON, dtype=dtype, device=DEVICE)
        for head, length in enumerate(lengths):
            block[:, head, :length] = torch.randn(batch, length, width, device=DEVICE).to(dtype)
        blocks.append(block)
    keys, values = blocks
    groups = [GroupSlots(range(len(lengths)), keys, values, lengths[0])]
    if not same_block:
        groups = [
            GroupSlots([head], *(block[:, head : head + 1, : length + spare].clone() for block in blocks), length)
            for head, length in enumerate(lengths)
            if length
        ]
    return query, groups, reference(query, keys, values, lengths)


def reference(query, keys, values, lengths):
    batch, query_heads, size = query.shape
    group = query_heads // len(lengths)
    out = torch.zeros(batch, query_heads, values.shape[-1], device=query.device)
    for head, length in enumerate(lengths):
        heads = slice(head * group, (head + 1) * group)
        scores = query[:, heads].float() @ keys[:, head, :length].float().transpose(1, 2) / math.sqrt(size)
        out[:, heads] = scores.softmax(dim=-1) @ values[:, head, :length].float()
    return out


def run(query, groups, heads, seen, scratch=None, tuning=None, pads=None, new=None):
    count = torch.tensor([seen], dtype=torch.int32, device=DEVICE)
    value_size = groups[0].values.shape[-1]
    tuning = tuning or (None if CUDA else Tuning(block=16, programs_per_processor=5, whole=24))
    out, scratch = ragged_decode.decode(
        query, table_of(groups, heads), value_size, count, pads, None, scratch, tuning, new
    )
    assert not scratch.arrivals.any()
    return out.float(), scratch


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def poisoned(monkeypatch):
    """Fill memory that is allocated empty with NaN."""
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(size, POISON, **options))


# lengths, query heads a KV head, head size, values' head size, dtype, batch
CASES = [
    ([37, 5, 0, 1], 4, 64, 64, BF16, 2),
    ([70], 1, 64, 64, FP16, 1),
    ([1, 1, 90], 3, 80, 80, BF16, 3),
    ([50, 16, 17], 8, 96, 96, BF16, 1),
    ([33, 60], 4, 128, 128, BF16, 2),
    ([20, 0, 64, 3], 1, 80, 80, FP16, 2),
    ([48, 7], 8, 256, 256, BF16, 1),
    ([40, 9], 4, 128, 64, FP16, 2),
    ([30, 30], 3, 64, 96, FP32, 2),
    ([25, 41, 3], 2, 16, 24, FP32, 2),
]


@needs_triton
@pytest.mark.parametrize(("lengths", "group", "size", "value_size", "dtype", "batch"), CASES)
def test_the_kernel_is_softmax_attention_of_every_head(poisoned, lengths, group, size, value_size, dtype, batch):
    torch.manual_seed(sum(lengths))
    query, groups, expected = make(batch, lengths, group, size, value_size, dtype)
    found, _ = run(query, groups, len(lengths), max(lengths))
    assert error(found, expected) < TOLERANCE[dtype]
    for head, length in enumerate(lengths):
        of_head = found[:, head * group : (head + 1) * group]
        assert length or not of_head.any()  # exactly 0


@needs_triton
@pytest.mark.parametrize("programs", [1, 2, 3, 11, 60])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize(("whole", "extra"), [(0, 0), (31, 2), (256, 5)])
def test_the_division_of_the_work_does_not_matter(poisoned, programs, block, whole, extra):
    torch.manual_seed(programs)
    lengths = [90, 0, 4, 31, 1]
    query, groups, expected = make(2, lengths, 8, 32, 32, FP32)  # 8: four partial results are merged at a time
    tuning = Tuning(block=block, programs_per_processor=programs, whole=whole, extra=extra)
    found, _ = run(query, groups, 5, 90, tuning=tuning)
    assert error(found, expected) < TOLERANCE[FP32]


@needs_triton
def test_a_grown_cache_needs_only_a_new_count_and_scratch_serves_again(poisoned):
    """Bounded heads stay as they are, the unbounded ones show more of their slots; scores are large and negative."""
    torch.manual_seed(0)
    query, groups, _ = make(1, [64, 20], 4, 64, 64, FP32)
    query *= -6
    groups[0] = groups[0]._replace(capacity=None)
    scratch = None
    for seen in (3, 20, 21, 63, 64):
        found, scratch = run(query, groups, 2, seen, scratch)
        blocks = [torch.cat([part[i][:, :, :20] for part in groups], dim=1) for i in (1, 2)]
        bounded = reference(query, *blocks, [min(seen, 20)] * 2)[:, 4:]
        full = reference(query[:, :4], groups[0].keys, groups[0].values, [seen])
        assert error(found, torch.cat((full, bounded), dim=1)) < TOLERANCE[FP32]
    query, groups, expected = make(3, [9, 40, 2], 1, 32, 32, FP32)
    assert error(run(query, groups, 3, 40, scratch)[0], expected) < TOLERANCE[FP32]


@needs_triton
@pytest.mark.parametrize("programs", [1, 4, 9])
@pytest.mark.parametrize("whole", [0, 24, 256])
def test_pads_are_hidden_and_a_row_of_pads_gives_zeros(poisoned, programs, whole):
    """An unbounded head and a ring of 12 that has turned; rows with pads up to all there is."""
    torch.manual_seed(programs)
    query, groups, _ = make(4, [48, 12], 3, 32, 32, FP32)
    groups[0] = groups[0]._replace(capacity=None)
    pads = torch.tensor([0, 21, 48, 40], device=DEVICE)
    for row, pad in enumerate(pads.tolist()):
        for tensor in groups[0][1:3]:
            tensor[row, :, :pad] = POISON
    tuning = Tuning(block=16, programs_per_processor=programs, whole=whole)
    found, _ = run(query, groups, 2, 48, tuning=tuning, pads=pads)
    assert not found[2].any()
    ring = [47 - (47 - slot) % 12 for slot in range(12)]  # the column in each slot
    for row in (0, 1, 3):
        pad = int(pads[row])
        of_row = [tensor[row : row + 1, :, pad:48] for tensor in groups[0][1:3]]
        shown = [slot for slot in range(12) if ring[slot] >= pad]
        of_ring = [tensor[row : row + 1, :, shown] for tensor in groups[1][1:3]]
        expected = torch.cat(
            [
                reference(query[row : row + 1, :3], *of_row, [48 - pad]),
                reference(query[row : row + 1, 3:], *of_ring, [len(shown)]),
            ],
            dim=1,
        )
        assert error(found[row : row + 1], expected) < TOLERANCE[FP32]


@needs_triton
@pytest.mark.parametrize(("size", "value_size", "dtype"), [(64, 80, FP32), (96, 64, FP16), (16, 16, BF16)])
def test_the_last_column_is_stored_before_it_is_read(size, value_size, dtype):
    """Three heads: unbounded, 2 sinks and a ring of 4, a ring of 5. Slots are poisoned until their column comes."""
    torch.manual_seed(0)
    kept = [Retention(0, -1), Retention(2, 4), Retention(0, 5)]
    blocks = [
        tuple(torch.full((2, 1, slots, width), POISON, dtype=dtype, device=DEVICE) for width in (size, value_size))
        for slots in (18, 6, 5)
    ]
    groups = [GroupSlots([i], *block, kept[i].capacity, kept[i].sinks) for i, block in enumerate(blocks)]
    column_major = [torch.randn(2, 18, 3, width, device=DEVICE).to(dtype) for width in (size, value_size)]
    text = [tensor.transpose(1, 2) for tensor in column_major]  # [batch, kv_head, column, head_dim]
    scratch = None
    for seen in range(1, 19):
        query = torch.randn(2, 6, size, device=DEVICE).to(dtype)
        new = tuple(tensor[:, :, seen - 1] for tensor in text)
        found, scratch = run(query, groups, 3, seen, scratch, new=new)
        for i, head in enumerate(kept):
            shown = head.positions(seen)
            keys, values = (tensor[:, i : i + 1, shown] for tensor in text)
            expected = reference(query[:, 2 * i : 2 * i + 2], keys, values, [len(shown)])
            assert error(found[:, 2 * i : 2 * i + 2], expected) < TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("full", [0, 1, 2])
def test_what_the_cost_program_times_is_the_same(full):
    torch.manual_seed(full)
    layer = Layer(Shape(4, 2, 32, 2, 140, full), FP32, DEVICE)
    assert error(layer.kernel(), layer.by_group()) < TOLERANCE[FP32]
    assert full < 2 or error(layer.kernel(), layer.dense()[:, :, 0]) < TOLERANCE[FP32]


@needs_triton
def test_a_query_may_be_a_view_and_the_scale_given():
    torch.manual_seed(0)
    _, groups, _ = make(2, [30, 30], 3, 32, 32, FP32, same_block=True)
    heads_last = torch.randn(2, 32, 6, device=DEVICE)
    count = torch.tensor([30], dtype=torch.int32, device=DEVICE)
    tuning = Tuning(block=16, whole=0)
    found, _ = ragged_decode.decode(heads_last.mT, table_of(groups, 2), 32, count, scale=0.5, tuning=tuning)
    expected = reference(heads_last.mT * 0.5 * math.sqrt(32), groups[0].keys, groups[0].values, [30, 30])
    assert error(found, expected) < TOLERANCE[FP32]


def both_ways(monkeypatch, family, plan, pads, chunks, length):
    """Logits of a text read group by group and by the kernel, and the `settled` of every launch.

    The two caches must hold the same at the end, slot by slot.
    """
    model = model_of(family).to(DEVICE)
    ids, mask = padded(3, length) if pads else (tokens(2, length), None)
    ids, mask = ids.to(DEVICE), None if mask is None else mask.to(DEVICE)
    compressor, launches, logits, held = compressor_for(model, plan), [], [], []

    def counted(*args, new, settled):
        launches.append(settled)
        return ragged_decode.decode(
            *args, new=new, settled=settled, tuning=Tuning(block=16, programs_per_processor=2 if CUDA else 3, whole=8)
        )

    monkeypatch.setattr(fused_decode, "decode", counted)
    if not CUDA:
        monkeypatch.setattr(fused_decode, "can_decode", lambda *_: True)
    try:
        for on in (False, True):
            with torch.inference_mode(), compressor.attached(model):
                cache = compressor.new_cache(model.config, prefill="streaming")
                cache.shared.fused.enabled = on
                out = feed(model, cache, ids, chunks, mask)
            logits.append(out.flatten(0, 1) if mask is None else out[mask.bool()])
            assert bool(launches) == on
            groups = [group for layer in cache.compressed_layers for group in layer.groups]
            held.append([tensor for group in groups for tensor in group.read()])
    finally:
        model.to("cpu")
    for first, second in zip(*held, strict=True):
        assert (first - second).abs().max() < 1e-4
    return *logits, launches


@needs_triton
@pytest.mark.parametrize(
    ("family", "plan", "pads", "chunks", "length", "steps"),
    [
        ("llama", "mixed", True, [9, 1], 18, 9),
        ("gpt_neox", "mixed", False, [1], 15, 15),
        ("llama", "pruned_layer", False, [1], 10, 10),
    ],
)
def test_a_cache_gives_the_same_logits_with_and_without(monkeypatch, family, plan, pads, chunks, length, steps):
    """Growth, filling and full rings, rows of pads, pruned heads."""
    by_group, at_once, launches = both_ways(monkeypatch, family, plan, pads, chunks, length)
    layers = 1 if plan == "pruned_layer" else 2
    assert len(launches) == steps * layers
    assert not any(launches[::layers])  # the first layer's launch comes right after the new count
    assert any(launches) == (layers > 1 and not pads)
    assert (by_group - at_once).abs().max() < 1e-4


@needs_triton
def test_keys_out_of_the_models_own_sight_are_left_to_the_groups(monkeypatch):
    by_group, at_once, launches = both_ways(monkeypatch, "mistral", "mixed", False, [15, 1], 24)
    assert len(launches) == 2 * (20 - 15)  # from its window of 20 on, sinks go out of sight
    assert (by_group - at_once).abs().max() < 1e-4


def test_a_cpu_is_served_group_by_group():
    query, keys = torch.zeros(1, 2, 4, 1, 64), torch.zeros(1, 2, 1, 64)
    assert not can_decode(query, keys, keys)


@needs_cuda
def test_what_the_kernel_cannot_do_is_refused():
    def served(size=64, value_size=64, group=4, dtype=BF16, cache=None):
        query = torch.zeros(1, 2, group, 1, size, dtype=dtype, device=DEVICE)
        keys, values = (torch.zeros(1, 2, 1, n, dtype=cache or dtype, device=DEVICE) for n in (size, value_size))
        return can_decode(query, keys, values)

    assert served()
    assert served(size=96, value_size=256, group=32)
    assert not served(size=264)
    assert not served(value_size=68)
    assert not served(group=129)
    assert not served(dtype=torch.float64)
    assert not served(cache=FP16)


@needs_cuda
@pytest.mark.parametrize(
    ("lengths", "group", "size"),
    [([8192] * 2 + [132] * 6, 4, 128), ([2048] * 8 + [132] * 24, 1, 80), ([8192] * 3, 3, 64), ([516] * 8, 8, 256)],
)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_long_contexts_and_the_same_bits_every_time(lengths, group, size, dtype):
    torch.manual_seed(0)
    query, groups, expected = make(16, lengths, group, size, size, dtype)
    first, scratch = run(query, groups, len(lengths), max(lengths))
    assert error(first, expected) < TOLERANCE[dtype]
    for _ in range(50):
        again, scratch = run(query, groups, len(lengths), max(lengths), scratch)
        assert torch.equal(again, first)


@needs_cuda
def test_a_captured_graph_follows_the_count():
    torch.manual_seed(0)
    query, groups, _ = make(4, [5000, 132], 4, 128, 128, BF16)
    groups[0] = groups[0]._replace(capacity=None)
    table, seen = table_of(groups, 2), torch.tensor([4000], dtype=torch.int32, device=DEVICE)
    _, scratch = ragged_decode.decode(query, table, 128, seen)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = ragged_decode.decode(query, table, 128, seen, scratch=scratch)
    for count in (4000, 4001, 4999, 5000, 140):
        seen.fill_(count)
        out.fill_(POISON)
        graph.replay()
        expected = torch.cat(
            [reference(query[:, :4], *groups[0][1:3], [count]), reference(query[:, 4:], *groups[1][1:3], [132])], dim=1
        )
        assert error(out.float(), expected) < TOLERANCE[BF16]
