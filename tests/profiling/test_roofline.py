"""Bounds: by hand on published shapes, by properties on any."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from paretron.families import expected_tensors, family_of
from paretron_profiling.compare import SAME_BATCH
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.roofline.bounds import (
    COMPUTE,
    LAUNCH,
    LAUNCHES,
    MEMORY,
    Costs,
    Formats,
    Launches,
    decode_bound,
    mean_context,
    mean_positions,
    prefill_bound,
)
from paretron_profiling.roofline.devices import Device, device_of
from paretron_profiling.roofline.predict import (
    Load,
    predict,
    predicted_speedups,
    same_memory_batch,
)
from pico import pico_model
from published import LLAMA

WIDTH = LLAMA | {"hidden_size": 3072, "intermediate_size": 9216}
DEPTH = LLAMA | {"num_hidden_layers": 16}
BF16 = Formats.of("bfloat16")
H100 = device_of("H100")
CPU = Device(
    "a CPU", "cpu", 1e10, {"float32": 1e11, "bfloat16": 5e10}, launch_s=1e-6, measured=True,
    bandwidths=((1 << 20, 5e10), (1 << 26, 2e10), (1 << 29, 1e10)),
)  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 320,
    "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = MIXTRAL | {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8,
    "tie_word_embeddings": True,
}  # fmt: skip


def test_an_8b_decode_step_by_hand() -> None:
    costs = Costs.of(LLAMA, formats=BF16)
    attention = 4096 * 4096 + 2 * 1024 * 4096 + 4096 * 4096
    layer = attention + 3 * 14336 * 4096
    head = 128256 * 4096
    norms = 65 * 4096
    assert costs.weight_bytes == 2 * (32 * layer + 2 * head + norms) == 2 * 8030261248
    assert costs.read_bytes(64) == 2 * (32 * layer + head + norms)  # the embedding is a lookup
    assert costs.kv_bytes_at(1) == 2 * 32 * 8 * 128 * 2
    step = decode_bound(costs, H100, batch=64, context=192)
    assert step.weights_s == pytest.approx(costs.read_bytes(64) / 3.35e12)
    assert step.kv_s == pytest.approx(64 * 192 * 131072 / 3.35e12)
    flops = 64 * (2 * (32 * layer + head) + 192 * 4 * 32 * 4096)
    assert step.compute_s == pytest.approx(flops / 989e12)
    assert step.bound_s == step.weights_s + step.kv_s > step.compute_s
    assert (step.limited_by, step.launch_s, step.with_launch_s) == (MEMORY, None, step.bound_s)


def test_a_prefill_by_hand() -> None:
    costs = Costs.of(LLAMA, formats=BF16)
    first = prefill_bound(costs, H100, batch=4, input_len=512)
    layers = 4 * 512 * 2 * 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    seen = sum(range(1, 513))  # positions, over the tokens of one prompt
    flops = layers + 4 * seen * 4 * 32 * 4096 + 4 * 2 * 128256 * 4096
    assert first.compute_s == pytest.approx(flops / 989e12)
    assert first.limited_by == COMPUTE


def test_width_keeps_every_layers_cache_and_depth_halves_it() -> None:
    teacher, width, depth = (Costs.of(c, formats=BF16) for c in (LLAMA, WIDTH, DEPTH))
    assert width.kv_bytes_at(100) == teacher.kv_bytes_at(100) == 2 * depth.kv_bytes_at(100)
    counted = LAUNCHES["transformers"]
    slow = replace(H100, launch_s=1e-5)
    launch = [
        decode_bound(c, slow, batch=1, context=128, launches=counted).launch_s
        for c in (teacher, width, depth)
    ]
    assert launch == pytest.approx([1e-5 * (n * 40 + 22) for n in (32, 32, 16)])
    # As many weights, but launches alone decide at batch 1: width gains nothing there.
    found = {
        (s.model, s.rule): s.ratio
        for s in predicted_speedups(
            {"teacher": teacher, "width": width, "depth": depth}, slow,
            loads=[Load(1, 128, 128)], launches=counted,
        )
    }  # fmt: skip
    assert found["width", SAME_BATCH] == pytest.approx(1.0)
    assert found["depth", SAME_BATCH] == pytest.approx(1302 / 662, rel=1e-3)


def test_a_batch_is_a_prefill_and_the_steps_after_it() -> None:
    costs = Costs.of(DEPTH, formats=BF16)
    made = predict("depth", costs, H100, load=Load(8, 100, 5))
    first = prefill_bound(costs, H100, batch=8, input_len=100).bound_s
    step = decode_bound(costs, H100, batch=8, context=102.5).bound_s
    assert made.total_s == pytest.approx(first + 4 * step)
    assert made.output_tok_s == pytest.approx(8 * 5 / made.total_s)


@given(st.integers(1, 2048), st.integers(1, 8192))
def test_the_same_memory_is_filled_and_not_passed(batch: int, tokens: int) -> None:
    teacher, width = (Costs.of(c, formats=BF16) for c in (LLAMA, WIDTH))
    load = Load(batch, tokens, 2)
    found, limit = same_memory_batch(width, teacher, load)
    budget = teacher.memory_bytes(batch=batch, context=tokens + 2)
    assert width.memory_bytes(batch=found, context=tokens + 2) <= budget
    more = width.memory_bytes(batch=found + 1, context=tokens + 2)
    assert (limit, found) == ("cap", 8 * batch) or (limit == "memory" and more > budget)
    assert same_memory_batch(teacher, width, Load(1, 1, 2)) == (0, "memory")


def test_eight_bit_layers_leave_the_head_in_sixteen() -> None:
    half, whole = Costs.of(LLAMA, formats=Formats.of("fp8")), Costs.of(LLAMA, formats=BF16)
    head = 2 * 128256 * 4096
    assert half.read_bytes(1) - head == (whole.read_bytes(1) - head) / 2
    assert half.kv_bytes == whole.kv_bytes == 2 * Costs.of(
        LLAMA, formats=Formats.of("fp8", kv="fp8")
    ).kv_bytes  # fmt: skip
    quick, slow = (prefill_bound(c, H100, batch=8, input_len=512) for c in (half, whole))
    seen = 8 * 512 * half.attention_flops_at(513 / 2, 0) + 8 * half.head_flops
    layers = 8 * 512 * half.layer_flops
    assert slow.compute_s == pytest.approx((layers + seen) / 989e12)
    assert quick.compute_s == pytest.approx(layers / 1979e12 + seen / 989e12)
    a100 = device_of("A100")  # no FP8 there: widened, and multiplied in bfloat16
    assert prefill_bound(half, a100, batch=8, input_len=512).compute_s == pytest.approx(
        prefill_bound(whole, a100, batch=8, input_len=512).compute_s
    )


def test_experts_are_read_as_often_as_they_are_touched() -> None:
    costs = Costs.of(MIXTRAL, formats=Formats.of("float32"))
    shapes = expected_tensors(family_of(MIXTRAL), MIXTRAL)
    params = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    experts = sum(n for name, n in params.items() if ".experts." in name)
    others = sum(params.values()) - experts - params["model.embed_tokens.weight"]
    assert (costs.shared_bytes, costs.expert_bytes) == (4 * others, 4 * experts)
    assert costs.read_bytes(1) == pytest.approx(4 * (others + experts * 2 / 8))
    assert costs.read_bytes(10_000) == pytest.approx(4 * (others + experts))
    rng = random.Random(0)
    touched = [len({e for _ in range(5) for e in rng.sample(range(8), 2)}) for _ in range(4000)]
    mean = sum(touched) / len(touched)
    assert costs.read_bytes(5) == pytest.approx(4 * (others + experts * mean / 8), rel=0.01)


def test_a_window_bounds_what_its_layers_read() -> None:
    costs = Costs.of(GEMMA, formats=BF16)
    one = 2 * 2 * 32 * 2
    assert costs.kv_bytes_at(5) == 4 * 5 * one
    assert costs.kv_bytes_at(100) == 2 * (100 + 8) * one
    full = Costs.of(GEMMA | {"sliding_window": None}, formats=BF16)
    assert full.kv_bytes_at(100) == 4 * 100 * one
    for bound in (
        lambda c: decode_bound(c, H100, batch=9, context=100),
        lambda c: prefill_bound(c, H100, batch=9, input_len=100),
    ):
        assert bound(costs).compute_s < bound(full).compute_s
        assert bound(costs).kv_s < bound(full).kv_s


@given(st.integers(1, 60), st.integers(0, 60))
def test_positions_and_contexts_on_average(length: int, window: int) -> None:
    seen = [min(t, window) for t in range(1, length + 1)]
    assert mean_positions(length, window) == pytest.approx(sum(seen) / length)
    steps = [length + j for j in range(1, window + 1)]
    if steps:
        assert mean_context(length, window + 1) == pytest.approx(sum(steps) / len(steps))


CONFIGS = st.sampled_from([LLAMA, WIDTH, DEPTH, MIXTRAL, GEMMA])
FORMATS = st.sampled_from([BF16, Formats.of("float32"), Formats.of("fp8", kv="fp8")])


@given(CONFIGS, FORMATS, st.integers(1, 512), st.integers(1, 8192), st.integers(1, 512))
def test_more_work_never_takes_less_time(
    config: Mapping[str, Any], formats: Formats, batch: int, context: int, more: int
) -> None:
    costs = Costs.of(config, formats=formats)
    for device in (H100, CPU):
        step = decode_bound(costs, device, batch=batch, context=context).bound_s
        first = prefill_bound(costs, device, batch=batch, input_len=context).bound_s
        assert decode_bound(costs, device, batch=batch + more, context=context).bound_s > step
        assert decode_bound(costs, device, batch=batch, context=context + more).bound_s >= step
        assert prefill_bound(costs, device, batch=batch + more, input_len=context).bound_s > first
        assert prefill_bound(costs, device, batch=batch, input_len=context + more).bound_s > first


@given(CONFIGS, st.integers(1, 512), st.integers(1, 8192), st.floats(1.01, 100))
def test_a_faster_device_never_takes_longer(
    config: Mapping[str, Any], batch: int, context: int, faster: float
) -> None:
    costs = Costs.of(config, formats=BF16)
    rates = {d: r * faster for d, r in H100.flop_s.items() if r}
    wide = replace(H100, bandwidth_bytes_s=H100.bandwidth_bytes_s * faster)
    both = replace(wide, flop_s=rates)
    for device, exact in ((wide, None), (replace(H100, flop_s=rates), None), (both, faster)):
        for bound_of in (
            lambda d: decode_bound(costs, d, batch=batch, context=context).bound_s,
            lambda d: prefill_bound(costs, d, batch=batch, input_len=context).bound_s,
        ):
            gain = bound_of(H100) / bound_of(device)
            assert gain >= 1 - 1e-12
            assert gain == pytest.approx(exact) if exact else gain <= faster * (1 + 1e-12)


def test_launches_add_up_on_a_cpu_and_hide_on_a_gpu() -> None:
    costs = Costs.of(MIXTRAL, formats=Formats.of("float32"))
    many = Launches(10_000, 0, "")
    for device, expected in ((CPU, lambda b: b.bound_s + b.launch_s),
                             (replace(CPU, kind="cuda"), lambda b: b.launch_s)):  # fmt: skip
        step = decode_bound(costs, device, batch=1, context=9, launches=many)
        assert step.launch_s == pytest.approx(1e-6 * 30_000)
        assert step.limited_by == LAUNCH
        assert step.with_launch_s == expected(step) > step.bound_s


class _Counted(TorchDispatchMode):
    """Counts what reaches torch's operators, views left out: they start nothing."""

    VIEWS = ("slice", "unsqueeze", "view", "transpose", "reshape", "expand")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.found[name] += name not in self.VIEWS
        return func(*args, **(kwargs or {}))


def test_what_transformers_launches_is_counted() -> None:
    found = {}
    for layers in (2, 3):
        model = pico_model(num_hidden_layers=layers).to(torch.bfloat16)
        ids = torch.zeros((1, 8), dtype=torch.int64)
        with torch.inference_mode():
            cache = model(ids, use_cache=True).past_key_values
            with _Counted() as counted:
                model(ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        found[layers] = counted.found.total()
    per_layer = found[3] - found[2]
    stated = LAUNCHES["transformers"]
    assert per_layer == pytest.approx(stated.per_layer, abs=4)  # of another version of transformers
    assert found[2] - 2 * per_layer == pytest.approx(stated.outside, abs=6)


def test_what_an_onnx_graph_launches_is_counted(models: list[ModelUnderTest]) -> None:
    graphs = {m.name: onnx.load(m.folders["onnx"] / "model.onnx", load_external_data=False)
              for m in models}  # fmt: skip
    deep, shallow = (len(graphs[name].graph.node) for name in ("teacher", "depth"))
    stated = LAUNCHES["ortgenai"]
    assert (deep - shallow) / 2 == pytest.approx(stated.per_layer, abs=2)
    assert deep - 4 * stated.per_layer == pytest.approx(stated.outside, abs=8)
