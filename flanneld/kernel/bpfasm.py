"""A small assembler for eBPF: it writes instructions, resolves labels and prints what it wrote.

It knows the instruction set and nothing about packets; ``backends/udp_programs.py`` writes the programs and the
kernel's verifier judges them. Arithmetic and comparisons are 32 bits wide unless said otherwise, so that a
constant with the top bit set (an IPv4 address) is never sign-extended; pointers are copied and compared whole.

Source: RFC 9669 (BPF instruction set architecture); helper numbers from include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum
from typing import Final

MAX_INSTRUCTIONS: Final = 4096  # the kernel's limit for a loader without CAP_BPF, and a hint that something is wrong

_INSTRUCTION = struct.Struct("=BBhi")  # opcode, registers, offset, immediate
_LD, _LDX, _ST, _STX, _ALU, _JMP, _JMP32, _ALU64 = range(8)
_MEM, _SOURCE_REGISTER, _WIDE_IMMEDIATE, _TO_BIG_ENDIAN = 0x60, 0x08, 0x18, 0xDC
_PSEUDO_MAP_FD = 1
_CALL, _EXIT, _GOTO = 0x85, 0x95, 0x05

_SIZES = {32: 0x00, 16: 0x08, 8: 0x10, 64: 0x18}
_OPERATIONS = {"+": 0x00, "-": 0x10, "|": 0x40, "&": 0x50, "<<": 0x60, ">>": 0x70, "^": 0xA0, "=": 0xB0}
_CONDITIONS = {"==": 0x10, ">": 0x20, ">=": 0x30, "&": 0x40, "!=": 0x50, "<": 0xA0, "<=": 0xB0}


class Reg(IntEnum):
    """A register. R0 is a helper's answer, R1 to R5 its arguments (lost in the call), R6 to R9 survive calls."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    FP = 10
    """End of the stack; everything on it has a negative offset."""

    def __str__(self) -> str:
        return "fp" if self is Reg.FP else f"r{self.value}"


class Helper(IntEnum):
    """Kernel functions that a program may call, as numbered in include/uapi/linux/bpf.h."""

    MAP_LOOKUP = 1
    SKB_STORE_BYTES = 9
    REDIRECT = 23
    SKB_LOAD_BYTES = 26
    GET_HASH_RECALC = 34
    CSUM_UPDATE = 40
    SKB_CHANGE_HEAD = 43
    SKB_ADJUST_ROOM = 50
    CSUM_LEVEL = 135
    REDIRECT_NEIGH = 152


class Program:
    """A program being written, top to bottom; jumps go forward only, so it ends for certain.

    Args:
        name: for the listing and for the kernel, 1 to 15 bytes.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._code: list[tuple[int, int, int, int]] = []
        """Opcode, registers, offset, immediate."""
        self._text: list[str] = []
        """By instruction, what the listing says; empty for the second half of a wide one."""
        self._notes: dict[int, str] = {}
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._code)

    # ---- values --------------------------------------------------------------------------------

    def set(self, to: Reg, value: int) -> None:
        """Put a constant into a register, 0 to 2^32 - 1 or a small negative number; the upper half becomes zero."""
        self._emit(_ALU | _OPERATIONS["="], to, 0, 0, value, f"{to} = {_number(value)}")

    def copy(self, to: Reg, source: Reg) -> None:
        """Copy a whole register, pointers included."""
        self._emit(_ALU64 | _SOURCE_REGISTER | _OPERATIONS["="], to, source, 0, 0, f"{to} = {source}")

    def address(self, to: Reg, base: Reg, offset: int) -> None:
        """Point into the stack or a map value."""
        self.copy(to, base)
        self._emit(_ALU64 | _OPERATIONS["+"], to, 0, 0, offset, f"{to} += {offset}")

    def compute(self, to: Reg, operation: str, value: Reg | int, *, bits: int = 32) -> None:
        """``to operation= value``, for one of ``+ - | & << >> ^``."""
        kind = (_ALU64 if bits == 64 else _ALU) | _OPERATIONS[operation]
        text = f"{to} {operation}= {_operand(value)}" + ("" if bits == 64 else " (32)")
        if isinstance(value, Reg):
            self._emit(kind | _SOURCE_REGISTER, to, value, 0, 0, text)
        else:
            self._emit(kind, to, 0, 0, value, text)

    def network_order(self, to: Reg, bits: int) -> None:
        """Convert the low bits of a register between host and network byte order; the rest becomes zero."""
        self._emit(_TO_BIG_ENDIAN, to, 0, 0, bits, f"{to} = be{bits}({to})")

    def load(self, to: Reg, base: Reg, offset: int, bits: int) -> None:
        """Read memory."""
        text = f"{to} = {_place(base, offset, bits)}"
        self._emit(_LDX | _MEM | _SIZES[bits], to, base, offset, 0, text)

    def store(self, base: Reg, offset: int, value: Reg | int, bits: int) -> None:
        """Write memory, from a register or a constant."""
        text = f"{_place(base, offset, bits)} = {_operand(value)}"
        if isinstance(value, Reg):
            self._emit(_STX | _MEM | _SIZES[bits], base, value, offset, 0, text)
        else:
            self._emit(_ST | _MEM | _SIZES[bits], base, 0, offset, value, text)

    def put(self, offset: int, content: bytes) -> None:
        """Write constant bytes to the stack, in the order given; R0 is lost.

        Linux 5.16 to 6.7 takes a number of known bounds that is stored at a multiple of 8 for a register put aside, and
        refuses a smaller store into the same 8 bytes after it, except to a process with CAP_PERFMON, which this one
        gives up. Turning the bytes round makes the verifier forget what the number is.
        """
        while content:
            size = next(n for n in (4, 2, 1) if n <= len(content) and offset % n == 0)
            if offset % 8 == 0 and size > 1 and any(content[:size]):
                self.set(Reg.R0, int.from_bytes(content[:size], "big"))
                self.network_order(Reg.R0, size * 8)
                self.store(Reg.FP, offset, Reg.R0, size * 8)
            else:
                self.store(Reg.FP, offset, int.from_bytes(content[:size], sys.byteorder), size * 8)
            offset, content = offset + size, content[size:]

    def map(self, to: Reg, fd: int) -> None:
        """Point to a map, named by this process's descriptor; the kernel puts in its address."""
        self._emit(_WIDE_IMMEDIATE, to, _PSEUDO_MAP_FD, 0, fd, f"{to} = map fd {fd}")
        self._emit(0, 0, 0, 0, 0, "")

    # ---- flow ----------------------------------------------------------------------------------

    def branch(self, left: Reg, condition: str, right: Reg | int, label: str, *, bits: int = 32) -> None:
        """Jump if the comparison (unsigned; ``&`` = any common bit) is true; pointers need ``bits=64``."""
        kind = (_JMP if bits == 64 else _JMP32) | _CONDITIONS[condition]
        text = f"if {left} {condition} {_operand(right)} goto {label}"
        self._jumps.append((len(self._code), label))
        if isinstance(right, Reg):
            self._emit(kind | _SOURCE_REGISTER, left, right, 0, 0, text)
        else:
            self._emit(kind, left, 0, 0, right, text)

    def goto(self, label: str) -> None:
        """Jump."""
        self._jumps.append((len(self._code), label))
        self._emit(_GOTO, 0, 0, 0, 0, f"goto {label}")

    def label(self, name: str) -> None:
        """Name the next instruction.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._labels:
            raise ValueError(f"{self.name} has two labels {name}")
        self._labels[name] = len(self._code)

    def call(self, helper: Helper) -> None:
        """Call a kernel function."""
        self._emit(_CALL, 0, 0, 0, helper, f"call {helper.name.lower()}")

    def exit(self) -> None:
        """End; R0 is the verdict."""
        self._emit(_EXIT, 0, 0, 0, 0, "exit")

    def note(self, text: str) -> None:
        """Say in the listing why the next instructions are there."""
        self._notes[len(self._code)] = text

    # ---- result --------------------------------------------------------------------------------

    def code(self) -> bytes:
        """The finished program.

        Raises:
            ValueError: a jump has no target or goes backward, or the program is too long.
        """
        if len(self._code) > MAX_INSTRUCTIONS:
            raise ValueError(f"{self.name} has {len(self._code)} instructions, more than {MAX_INSTRUCTIONS}")
        distance = {at: self._distance(at, label) for at, label in self._jumps}
        return b"".join(
            _INSTRUCTION.pack(kind, registers, distance.get(at, offset), value)
            for at, (kind, registers, offset, value) in enumerate(self._code)
        )

    def _distance(self, at: int, label: str) -> int:
        if label not in self._labels:
            raise ValueError(f"{self.name} jumps to {label}, which is nowhere")
        if self._labels[label] <= at:
            raise ValueError(f"{self.name} jumps back to {label}")
        return self._labels[label] - at - 1

    def listing(self) -> str:
        """The program as text, in the notation of the kernel's verifier, with notes and labels."""
        labels: dict[int, list[str]] = {}
        for label, at in self._labels.items():
            labels.setdefault(at, []).append(label)
        lines = []
        for at, text in enumerate(self._text):
            lines += [f"{label}:" for label in labels.get(at, ())]
            if at in self._notes:
                lines.append(f"      ; {self._notes[at]}")
            if text:
                lines.append(f"{at:4}  {text}")
        return "\n".join(lines) + "\n"

    def _emit(self, kind: int, to: int, source: int, offset: int, value: int, text: str) -> None:
        if not -(1 << 15) <= offset < 1 << 15 or not -(1 << 31) <= value < 1 << 32:
            raise ValueError(f"{self.name} cannot encode {text}")
        signed = value - (1 << 32) if value >= 1 << 31 else value
        self._code.append((kind, to | source << 4, offset, signed))
        self._text.append(text)


def _number(value: int) -> str:
    return hex(value) if value > 0xFFF else str(value)


def _operand(value: Reg | int) -> str:
    return str(value) if isinstance(value, Reg) else _number(value)


def _place(base: Reg, offset: int, bits: int) -> str:
    return f"*(u{bits} *)({base} {'-' if offset < 0 else '+'} {abs(offset)})"
