"""The assembler: encodings against bytes written by hand from RFC 9669, jumps, and the listing."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from flanneld.kernel.bpfasm import MAX_INSTRUCTIONS, Helper, Program, Reg

R0, R1, R2, R6, FP = Reg.R0, Reg.R1, Reg.R2, Reg.R6, Reg.FP

pytestmark = pytest.mark.skipif(sys.byteorder == "big", reason="the expected bytes are little-endian")

# opcode, registers (source high, destination low), offset, immediate; RFC 9669 section 3, little-endian
ENCODINGS: list[tuple[str, Callable[[Program], None], str]] = [
    ("set", lambda p: p.set(R0, 7), "b4 00 0000 07000000"),
    ("set, top bit", lambda p: p.set(R0, 0xC0000201), "b4 00 0000 010200c0"),
    ("set, negative", lambda p: p.set(R0, -1), "b4 00 0000 ffffffff"),
    ("copy", lambda p: p.copy(R6, R1), "bf 16 0000 00000000"),
    ("address", lambda p: p.address(R2, FP, -8), "bf a2 0000 00000000 07 02 0000 f8ffffff"),
    ("add", lambda p: p.compute(R1, "+", R2), "0c 21 0000 00000000"),
    ("add 64", lambda p: p.compute(R1, "+", R2, bits=64), "0f 21 0000 00000000"),
    ("and", lambda p: p.compute(R1, "&", 0xFFFFFF), "54 01 0000 ffffff00"),
    ("shift", lambda p: p.compute(R1, ">>", 4), "74 01 0000 04000000"),
    ("xor", lambda p: p.compute(R1, "^", 0xFFFF), "a4 01 0000 ffff0000"),
    ("be16", lambda p: p.network_order(R1, 16), "dc 01 0000 10000000"),
    ("load 32", lambda p: p.load(R2, R6, 16, 32), "61 62 1000 00000000"),
    ("load 8", lambda p: p.load(R2, FP, -64, 8), "71 a2 c0ff 00000000"),
    ("store register", lambda p: p.store(FP, -4, R2, 32), "63 2a fcff 00000000"),
    ("store constant", lambda p: p.store(FP, -8, 5, 64), "7a 0a f8ff 05000000"),
    ("put", lambda p: p.put(-6, b"\x45\x00\x00\x1c\x11\x11"), "6a 0a faff 45000000 62 0a fcff 001c1111"),
    ("map", lambda p: p.map(R1, 9), "18 11 0000 09000000 00 00 0000 00000000"),
    ("call", lambda p: p.call(Helper.REDIRECT_NEIGH), "85 00 0000 98000000"),
    ("exit", lambda p: p.exit(), "95 00 0000 00000000"),
]


@pytest.mark.parametrize(("write", "expected"), [case[1:] for case in ENCODINGS], ids=[case[0] for case in ENCODINGS])
def test_instruction_is_encoded_as_the_rfc_says(write: Callable[[Program], None], expected: str) -> None:
    program = Program("t")
    write(program)
    assert program.code().hex() == expected.replace(" ", "")


def test_jump_counts_from_the_next_instruction() -> None:
    program = Program("t")
    program.branch(R1, "==", 8, "end")
    program.set(R0, 0)
    program.goto("end")
    program.set(R0, 1)
    program.label("end")
    program.exit()
    code = program.code()
    assert code[:8].hex() == "1601030008000000"  # 32-bit comparison, over three
    assert code[16:24].hex() == "0500010000000000"


def test_a_wide_instruction_counts_as_two_in_a_jump() -> None:
    program = Program("t")
    program.branch(R0, "!=", 0, "end", bits=64)
    program.map(R1, 3)
    program.label("end")
    program.exit()
    assert program.code()[:8].hex() == "5500020000000000"
    assert len(program) == 4


def test_a_jump_to_nowhere_is_refused_by_name() -> None:
    program = Program("encap")
    program.goto("lost")
    with pytest.raises(ValueError, match="encap jumps to lost, which is nowhere"):
        program.code()


def test_a_jump_back_is_refused_so_that_programs_end() -> None:
    program = Program("t")
    program.label("again")
    program.set(R0, 0)
    program.goto("again")
    with pytest.raises(ValueError, match="jumps back to again"):
        program.code()


def test_a_label_is_unique() -> None:
    program = Program("t")
    program.label("here")
    with pytest.raises(ValueError, match="two labels here"):
        program.label("here")


@pytest.mark.parametrize("offset", [-32769, 32768])
def test_an_offset_that_does_not_fit_is_refused(offset: int) -> None:
    with pytest.raises(ValueError, match="cannot encode"):
        Program("t").load(R0, R1, offset, 32)


def test_a_program_the_kernel_would_refuse_for_length_is_refused_here() -> None:
    program = Program("t")
    for _ in range(MAX_INSTRUCTIONS + 1):
        program.exit()
    with pytest.raises(ValueError, match="more than 4096"):
        program.code()


def test_the_listing_can_be_read_aloud() -> None:
    program = Program("t")
    program.note("IPv4 only")
    program.load(R2, R6, 16, 32)
    program.branch(R2, "!=", 8, "pass")
    program.map(R1, 3)
    program.call(Helper.MAP_LOOKUP)
    program.label("pass")
    program.set(R0, -1)
    program.exit()
    assert program.listing() == (
        "      ; IPv4 only\n"
        "   0  r2 = *(u32 *)(r6 + 16)\n"
        "   1  if r2 != 8 goto pass\n"
        "   2  r1 = map fd 3\n"
        "   4  call map_lookup\n"
        "pass:\n"
        "   5  r0 = -1\n"
        "   6  exit\n"
    )
