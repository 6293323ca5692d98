"""Operations, bytes and times of the kernels of a GPU program, counted by hand."""

from __future__ import annotations

import pytest

from sct.errors import SctError
from sct.speed.kernels import Program, Rates, by_group, bytes_of, kernels

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_product (p0: bf16[8,16], p1: bf16[16,4]) -> bf16[8,4] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[16,4]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_part (p0.1: f32[10,64], p1.1: s32[]) -> f32[1,64] {
  %p0.1 = f32[10,64]{1,0} parameter(0)
  %double = f32[10,64]{1,0} add(%p0.1, %p0.1)
  %p1.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[1,64]{1,0} dynamic-slice(%double, %p1.1, %zero), dynamic_slice_sizes={1,64}
}

%fused_put (p0.2: f32[10,64], p1.2: f32[1,64], p2.2: s32[]) -> f32[10,64] {
  %p0.2 = f32[10,64]{1,0} parameter(0)
  %p1.2 = f32[1,64]{1,0} parameter(1)
  %p2.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  ROOT %put = f32[10,64]{1,0} dynamic-update-slice(%p0.2, %p1.2, %p2.2, %zero.2)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %ab = f32[] add(%a, %b)
}

%fused_sum (p0.3: f32[10,64]) -> (f32[64], f32[10,64]) {
  %p0.3 = f32[10,64]{1,0} parameter(0)
  %square = f32[10,64]{1,0} multiply(%p0.3, %p0.3)
  %none = f32[] constant(0)
  %total = f32[64]{0} reduce(%square, %none), dimensions={0}, to_apply=%sum
  ROOT %both = (f32[64]{0}, f32[10,64]{1,0}) tuple(%total, %square)
}

%body (state: (s32[], f32[10,64])) -> (s32[], f32[10,64]) {
  %state = (s32[], f32[10,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %whole = f32[10,64]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,64]{1,0} fusion(%whole, %i), kind=kLoop, calls=%fused_part
  %new = f32[10,64]{1,0} fusion(%whole, %row, %i), kind=kLoop, calls=%fused_put, metadata={op_name="jit(step)/loop/put"}
  ROOT %next = (s32[], f32[10,64]{1,0}) tuple(%i, %new)
}

%condition (state.1: (s32[], f32[10,64])) -> pred[] {
  %state.1 = (s32[], f32[10,64]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (x: bf16[8,16], w: bf16[16,4], a.1: f32[10,64], s: bf16[1,100,8], k: bf16[32,5,8]) -> f32[64] {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,4]{1,0} parameter(1)
  %a.1 = f32[10,64]{1,0} parameter(2)
  %s = bf16[1,100,8]{2,1,0} parameter(3)
  %k = bf16[32,5,8]{2,1,0} parameter(4)
  %product = bf16[8,4]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused_product
  %start = s32[] constant(0)
  %made = (s32[], f32[10,64]{1,0}) tuple(%start, %a.1)
  %loop = (s32[], f32[10,64]{1,0}) while(%made), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %last = f32[10,64]{1,0} get-tuple-element(%loop), index=1
  %conv = (bf16[1,100,32]{2,1,0}, u8[0]{0}) custom-call(%s, %k), window={size=5 pad=2_2}, dim_labels=b0f_o0i->b0f, custom_call_target="__cudnn$convForward"
  %y = bf16[1,100,32]{2,1,0} get-tuple-element(%conv), index=0
  %to_s = (bf16[1,100,8]{2,1,0}, u8[0]{0}) custom-call(%y, %k), window={size=5 pad=2_2}, dim_labels=b0f_o0i->b0f, custom_call_target="__cudnn$convBackwardInput"
  %to_k = (bf16[32,5,8]{2,1,0}, u8[0]{0}) custom-call(%s, %y), window={size=5 pad=2_2}, dim_labels=b0f_o0i->b0f, custom_call_target="__cudnn$convBackwardFilter"
  %sums = (f32[64]{0}, f32[10,64]{1,0}) fusion(%last), kind=kInput, calls=%fused_sum
  ROOT %result = f32[64]{0} get-tuple-element(%sums), index=0
}
"""  # noqa: E501


def test_kernels_are_counted():
    found = {one.name: one for one in kernels(Program(PROGRAM))}
    conv = 2 * 100 * 32 * 5 * 8
    moved = 2 * (100 * 8 + 32 * 5 * 8 + 100 * 32)
    expected = {
        "product": ("matrix product", 1, 2 * 8 * 4 * 16, 2 * (8 * 16 + 16 * 4 + 8 * 4)),
        # Only the row is read, although the whole array is doubled in the program.
        "row": ("elementwise", 10, 0, 4 * (64 + 64 + 1)),
        "new": ("copy or conversion", 10, 0, 4 * (64 + 64 + 1)),
        "conv": ("convolution, forward", 1, conv, moved),
        "to_s": ("convolution, gradient of the input", 1, conv, moved),
        "to_k": ("convolution, gradient of the weights", 1, conv, moved),
        "sums": ("elementwise with sums", 1, 0, 4 * (640 + 64 + 640)),
    }
    assert {name: (one.group, one.times, one.flops, one.bytes) for name, one in found.items()} == expected
    assert found["new"].source == "jit(step)/loop/put"


def test_times_are_those_of_operations_or_of_bytes():
    rates = Rates(1e3, 2e3, 1e2)
    found = {one.name: one for one in kernels(Program(PROGRAM))}
    assert found["product"].seconds(rates) == pytest.approx(max(1024 / 1e3, 448 / 1e2))
    assert found["conv"].seconds(rates) == pytest.approx(256_000 / 2e3)
    assert found["row"].seconds(rates) == pytest.approx(10 * 516 / 1e2)
    groups = by_group(found.values(), rates)
    assert groups == sorted(groups, key=lambda row: -row[-1])
    assert sum(row[-1] for row in groups) == pytest.approx(sum(one.seconds(rates) for one in found.values()))
    assert sum(row[1] for row in groups) == 25


# Name and text of an instruction after those of PROGRAM, and its operations.
OTHERS = {
    "cublas": (
        '(bf16[8,4]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config='
        '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["0"]}}}',
        2 * 8 * 4 * 16,
    ),
    "product_alone": (
        "bf16[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        2 * 8 * 4 * 16,
    ),
    "raw_conv": (
        "bf16[1,100,32]{2,1,0} convolution(%s, %k), window={size=5 pad=2_2}, dim_labels=b0f_o0i->b0f",
        2 * 100 * 32 * 5 * 8,
    ),
    "channels_second": (
        "(bf16[1,32,100]{2,1,0}, u8[0]{0}) custom-call(%s, %k), window={size=5 pad=2_2}, dim_labels=b0f_o0i->bf0, "
        'custom_call_target="__cudnn$convForward"',
        2 * 100 * 32 * 5 * 8,
    ),
    "nested": ("bf16[8,4]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused_outer", 2 * 8 * 4 * 16),
    "begun": (
        "((bf16[8,16], bf16[16,4]), bf16[8,4]) async-start(%x, %w), calls=%fused_product",
        2 * 8 * 4 * 16,
    ),
    "copied": ("(bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[]) copy-start(%x)", 0),
    "sorted": ('(bf16[8,2]{1,0}, s32[8,2]{1,0}) custom-call(%x), custom_call_target="TopK"', 0),
}
REFUSED = {
    "foreign": 'bf16[8,4]{1,0} custom-call(%x, %w), custom_call_target="__gpu$xla.gpu.triton"',
    "solved": "bf16[8,4]{1,0} triangular-solve(%x, %w)",
    "sent-start": "((bf16[8,16]), bf16[8,16]) all-gather-start(%x)",
}
OUTER = """
%fused_outer (p0.4: bf16[8,16], p1.4: bf16[16,4]) -> bf16[8,4] {
  %p0.4 = bf16[8,16]{1,0} parameter(0)
  %p1.4 = bf16[16,4]{1,0} parameter(1)
  ROOT %inner = bf16[8,4]{1,0} fusion(%p0.4, %p1.4), kind=kCustom, calls=%fused_product
}

ENTRY"""


def test_every_product_is_counted_or_refused():
    """An estimate that left out products would be too short without notice."""
    before = sum(one.times * one.flops for one in kernels(Program(PROGRAM)))

    def with_one(name: str, text: str) -> Program:
        made = PROGRAM.replace("  %start =", f"  %{name} = {text}\n  %start =")
        return Program(made.replace("\nENTRY", OUTER, 1))

    failed = []
    for name, (text, flops) in OTHERS.items():
        found = sum(one.times * one.flops for one in kernels(with_one(name, text))) - before
        failed += [] if found == flops else [f"{name}: {found}, not {flops}"]
    assert not failed, failed
    for name, text in REFUSED.items():
        with pytest.raises(SctError, match=f"{name}.*kernels.py"):
            kernels(with_one(name, text))


def test_a_loop_of_unknown_length_is_an_error():
    text = PROGRAM.replace('"known_trip_count":{"n":"10"}', "")
    with pytest.raises(SctError, match="number of iterations"):
        kernels(Program(text))


def test_bytes_of_types():
    assert bytes_of("(bf16[2,3]{1,0}, f32[], pred[7]{0}, s64[1])") == 12 + 4 + 7 + 8
