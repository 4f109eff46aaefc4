"""The emulator itself, on PTX written by hand: what it computes, what it finds and what it must not find."""

import math
import struct

import pytest
import torch

from . import cases  # noqa: F401  first: it skips where there is no emulator
from .emulator import PTXError, execute

REGISTERS = ("p", "pred"), ("rs", "b16"), ("r", "b32"), ("rd", "b64")


def run(body: str, tensor: torch.Tensor, programs: int = 1, threads: int = 64, **settings) -> None:
    """Run a kernel whose one parameter, in %rd0, is the address of `tensor`; %rd1 is that of its element of this thread."""
    declared = "\n".join(f"\t.reg .{kind} \t%{name}<20>;" for name, kind in REGISTERS)
    ptx = f"""
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid {threads}
{{
{declared}
	ld.param.b64 	%rd0, [kernel_param_0];
	mov.u32 	%r0, %tid.x;
	mad.wide.u32 	%rd1, %r0, {tensor.itemsize}, %rd0;
	mov.b32 	%r1, global_smem;
	mad.wide.u32 	%rd2, %r0, 4, 0;
	cvt.u32.u64 	%r2, %rd2;
	add.s32 	%r2, %r2, %r1;
{body}
	ret;
}}
"""
    region = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, tensor.itemsize
    execute(ptx, programs, [tensor.data_ptr()], [region], **settings)


def of_bits(value: int) -> float:
    return struct.unpack("<f", struct.pack("<I", value))[0]


INSTRUCTIONS = [
    ("prmt.b32 %r5, 0x44332211, 0x88776655U, 0x7531U;", 0x88664422),
    ("prmt.b32 %r5, 0x44332281, 0, 0x7798U;", 0x000000FF),  # byte 0's sign; byte 1's; byte 7, twice
    ("bfe.u32 %r5, 0xABCD1234U, 8, 12;", 0xD12),
    ("mov.b64 %rd5, 0x8000000000000000;\nbfe.s64 %rd5, %rd5, 31, 33;\ncvt.u32.u64 %r5, %rd5;", 0),
    ("mov.b64 %rd5, 0x4000000080000000;\nbfe.s64 %rd5, %rd5, 31, 32;\ncvt.u32.u64 %r5, %rd5;", 0x80000001),
    ("shl.b32 %r5, 1, 32;", 0), ("shr.u32 %r5, 0x80000000U, 40;", 0), ("shr.s32 %r5, 0x80000000U, 40;", 0xFFFFFFFF),
    ("min.f32 %r5, 0f7FC00000, 0f3F800000;", 0x3F800000), ("max.NaN.f32 %r5, 0f7FC00000, 0f3F800000;", 0x7FFFFFFF),
    ("min.f32 %r5, 0f00000000, 0f80000000;", 0x80000000), ("max.f32 %r5, 0f80000000, 0f00000000;", 0),
    ("setp.ne.f32 %p1, 0f7FC00000, 0f3F800000;\nselp.b32 %r5, 1, 0, %p1;", 0),
    ("setp.neu.f32 %p1, 0f7FC00000, 0f3F800000;\nselp.b32 %r5, 1, 0, %p1;", 1),
    ("setp.leu.f32 %p1, 0f7FC00000, 0f3F800000;\nselp.b32 %r5, 1, 0, %p1;", 1),
    ("cvt.rzi.s32.f32 %r5, 0f7FC00000;", 0), ("cvt.rzi.s32.f32 %r5, 0f4F000000;", 0x7FFFFFFF),
    ("cvt.rpi.ftz.f32.f32 %r5, 0f00000001;", 0), ("cvt.rpi.ftz.f32.f32 %r5, 0f3F800001;", 0x40000000),
    ("cvt.rn.bf16x2.f32 %r5, 0f3F808000, 0f3F818000;", 0x3F803F82),
    ("cvt.rn.bf16.f32 %rs1, 0f7F7FFFFF;\ncvt.f32.bf16 %r5, %rs1;", 0x7F800000),
    ("cvt.rn.f16.f32 %rs1, 0f33000001;\ncvt.f32.f16 %r5, %rs1;", 0x33800000),
    ("fma.rn.f32 %r5, 0f3F800001, 0f3F800001, 0fBF800002;", 0x28800000), ("div.rn.f32 %r5, 0f00000001, 0f3F000000;", 2),
]


def test_instructions():
    result = torch.zeros(64, len(INSTRUCTIONS), dtype=torch.int32)
    run("\n".join([f"mad.wide.u32 %rd3, %r0, {result.stride(0) * 4}, %rd0;",
                   *(f"{instruction}\nst.global.b32 [ %rd3 + {4 * i} ], {{ %r5 }};"
                     for i, (instruction, _) in enumerate(INSTRUCTIONS))]), result)
    found = dict(zip((instruction for instruction, _ in INSTRUCTIONS), (result[0].long() & 0xFFFFFFFF).tolist()))
    assert found == dict(INSTRUCTIONS) and (result == result[0]).all()


@pytest.mark.parametrize("instruction, function", [("ex2.approx.f32 %r5, %r5;", lambda x: 2.0**x),
                                                   ("div.full.f32 %r5, 0f3F800000, %r5;", lambda x: 1 / x)])
def test_approximate_instructions_are_off_but_not_far(instruction, function):
    x = torch.linspace(-20, 20, 64)
    expected = torch.tensor([function(value) for value in x.double().tolist()], dtype=torch.float64)
    run(f"ld.global.b32 {{ %r5 }}, [ %rd1 + 0 ];\n{instruction}\nst.global.b32 [ %rd1 + 0 ], {{ %r5 }};", x)
    error = (x.double() / expected - 1).abs()
    assert 0 < error.max() <= 2.5 * 2**-23


def test_an_instruction_that_is_not_known_is_an_error():
    for instruction in ("sin.approx.f32 %r5, %r6;", "bar.sync 1;", "atom.global.gpu.weak.add.u32 %r5, [ %rd1 + 0 ], 1;"):
        with pytest.raises(NotImplementedError):
            run(instruction, torch.zeros(64))


def test_shuffles_sum_over_a_warp_and_barriers_over_warps():
    x = torch.arange(64.0)
    rounds = "\n".join(f"shfl.sync.bfly.b32 %r6, %r5, {1 << k}, 31, -1;\nadd.rn.f32 %r5, %r5, %r6;" for k in range(5))
    run(f"""ld.global.b32 {{ %r5 }}, [ %rd1 + 0 ];
{rounds}
st.shared.b32 [%r2], %r5;
bar.sync 0;
ld.shared.b32 %r6, [global_smem];
ld.shared.b32 %r7, [global_smem+128];
add.rn.f32 %r5, %r6, %r7;
st.global.b32 [ %rd1 + 0 ], {{ %r5 }};""", x, shared=256)
    assert (x == 63 * 32).all()


@pytest.mark.parametrize("body, message", [
    ("ld.global.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd0 + 4 ];", "16 bytes is misaligned"),
    ("ld.global.b32 { %r5 }, [ %rd1 + 256 ];", "outside all memory"),
    ("ld.global.v2.b32 { %r5, %r6 }, [ %rd0 + -8 ];", "outside all memory"),
    ("ld.shared.b32 %r5, [%r2+4];", "outside shared memory"),
    ("ld.shared.b32 %r5, [%r2];", "uninitialized shared memory"),
    ("st.shared.b32 [%r2], %r0;\nld.shared.b32 %r5, [global_smem];", "shared race: .* of one warp"),
    ("st.shared.b32 [%r2], %r0;\nld.shared.b32 %r5, [global_smem];", "shared race: .* of two warps"),
    ("st.shared.b32 [%r1], %r0;", "shared race: write .* write .* of one warp"),
    ("st.shared.b32 [%r1], 7;", "shared race: write .* write .* of two warps"),
    ("st.global.b32 [ %rd0 + 0 ], { %r0 };", "global race: write .* write .* of one warp"),
    ("ld.global.b32 { %r5 }, [ %rd0 + 0 ];\nst.global.b32 [ %rd1 + 0 ], { %r0 };", "global race: .* of one program"),
    ("st.global.b32 [ %rd1 + 0 ], { %r0 };", "global race: write .* write .* of two programs"),
    ("ld.global.b32 { %r5 }, [ %rd0 + 0 ];\natom.global.gpu.relaxed.add.u32 %r6, [ %rd0 + 0 ], 1;", "race: .*read.*atomic"),
    ("setp.lt.s32 %p1, %r0, 40;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:\nbar.sync 0;", "deadlock: threads wait|of one warp meet"),
    ("setp.lt.s32 %p1, %r0, 32;\n@%p1 ret;\nbar.sync 0;", "deadlock: threads wait"),
    ("$L1:\nld.global.gpu.acquire.b32 %r5, [ %rd0 + 0 ];\nsetp.eq.b32 %p1, %r5, 0;\n@%p1 bra $L1;", "wait for each other"),
])
def test_what_is_wrong_is_found(body, message):
    for seed in range(3):
        with pytest.raises(PTXError, match=message):
            run(body, torch.zeros(64, dtype=torch.int32), programs=2, shared=256, seed=seed)


FIRST = "setp.eq.b32 %p1, %r0, 0;\nmov.u32 %r3, %ctaid.x;\nsetp.eq.b32 %p2, %r3, 0;\nand.pred %p2, %p1, %p2;\n"


def test_a_warp_may_write_the_same_bytes_at_once():
    run("shr.u32 %r4, %r0, 5;\nmad.wide.u32 %rd3, %r4, 4, %rd0;\nst.global.b32 [ %rd3 + 0 ], { %r4 };\n"
        "cvt.u32.u64 %r5, %rd2;\nand.b32 %r5, %r5, 128;\nadd.s32 %r5, %r5, %r1;\nst.shared.b32 [%r5], %r4;",
        torch.zeros(64, dtype=torch.int32), shared=256)


@pytest.mark.parametrize("release, acquire, atomic, ordered", [
    ("release", "acquire", "exch.b32", True), ("acq_rel", "acquire", "add.u32", True),
    ("relaxed", "acquire", "exch.b32", False), ("release", "relaxed", "exch.b32", False),
])
def test_a_release_hands_on_what_all_threads_wrote_before_a_barrier(release, acquire, atomic, ordered):
    """Program 0 writes 64 numbers, thread by thread; its first thread says so, and the first of program 1 hears it."""
    body = FIRST + f"""setp.eq.b32 %p3, %r3, 0;
@!%p3 bra $L1;
st.global.b32 [ %rd1 + 0 ], {{ %r0 }};
bar.sync 0;
@%p2 atom.global.gpu.{release}.{atomic} %r5, [ %rd0 + 256 ], 1;
bra.uni $L3;
$L1:
@!%p1 bra $L2;
$L4:
ld.global.gpu.{acquire}.b32 %r5, [ %rd0 + 256 ];
setp.eq.b32 %p4, %r5, 0;
@%p4 bra $L4;
$L2:
bar.sync 0;
ld.global.b32 {{ %r6 }}, [ %rd1 + 0 ];
add.s32 %r6, %r6, 1;
st.global.b32 [ %rd1 + 0 ], {{ %r6 }};
$L3:"""
    for seed in range(5):
        memory = torch.zeros(65, dtype=torch.int32)
        if ordered:
            run(body, memory, programs=2, seed=seed)
            assert memory.tolist() == [*range(1, 65), 1]
        else:
            with pytest.raises(PTXError, match="global race: write .* read .* of two programs"):
                run(body, memory, programs=2, seed=seed)


def test_a_release_without_the_barrier_hands_on_its_own_thread_only():
    body = FIRST + """setp.eq.b32 %p3, %r3, 0;
@!%p3 bra $L1;
st.global.b32 [ %rd1 + 0 ], { %r0 };
@%p2 atom.global.gpu.release.exch.b32 %r5, [ %rd0 + 256 ], 1;
bra.uni $L3;
$L1:
@!%p1 bra $L3;
$L4:
ld.global.gpu.acquire.b32 %r5, [ %rd0 + 256 ];
setp.eq.b32 %p4, %r5, 0;
@%p4 bra $L4;
ld.global.b32 { %r6 }, [ %rd0 + PLACE ];
$L3:"""
    run(body.replace("PLACE", "0"), torch.zeros(65, dtype=torch.int32), programs=2)
    with pytest.raises(PTXError, match="global race: .* of two programs"):
        run(body.replace("PLACE", "4"), torch.zeros(65, dtype=torch.int32), programs=2)


def test_as_many_programs_as_there_may_be_and_any_number_of_them_resident():
    for resident in (1, 2, 50):
        memory = torch.zeros(64, dtype=torch.int32)
        run("atom.global.gpu.relaxed.add.u32 %r5, [ %rd1 + 0 ], 1;", memory, programs=200, resident=resident)
        assert memory.tolist() == [200] * 64


def test_float32_arithmetic_is_the_processor_s():
    x = torch.tensor([1e-45, 3.4e38, math.inf, 0.1] * 16)
    run("ld.global.b32 { %r5 }, [ %rd1 + 0 ];\nadd.rn.f32 %r6, %r5, %r5;\nst.global.b32 [ %rd1 + 0 ], { %r6 };", x)
    assert x[:4].tolist() == [of_bits(2), math.inf, math.inf, of_bits(0x3E4CCCCD)]
