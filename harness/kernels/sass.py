"""What `cuobjdump -res-usage -sass` says of a compiled kernel: resources, tensor-core instructions, spills in loops.

A loop is what can be executed again: the code on a cycle of the control-flow graph. A backward branch alone does not
make one, because ptxas moves cold code, such as a wait that has to be repeated, behind the end and jumps back from it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# HMMA and IMMA up to Ampere, also later for small tiles; *GMMA of a Hopper warp group; UTC*MMA of Blackwell.
TENSOR_CORE = re.compile(r"(?:UTC[A-Z]|[A-Z]G|[HIQ])MMA")

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_FUNCTION = re.compile(r"^\s*Function : ", re.MULTILINE)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")
_TARGET = re.compile(r"(?:^|[\s,])0x([0-9a-f]+)\s*$")
# In very long code ptxas branches by a call that nothing returns from.
_JUMPS = frozenset({"BRA", "CALL"})
_ENDS = frozenset({"EXIT", "RET"})


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `guarded`: it may be skipped, so that the next one can follow."""

    address: int
    opcode: str
    operands: str
    guarded: bool

    @property
    def jumps_to(self) -> int | None:
        """The address that a branch or a call goes to; None for any other instruction."""
        found = _TARGET.search(self.operands) if self.opcode in _JUMPS else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can be executed after this one."""
        if self.guarded:
            return True
        if self.opcode == "BRA":
            # A branch by a uniform predicate, or one that only diverging threads take, has it among its operands.
            return "," in self.operands
        return self.opcode not in _ENDS


@dataclass(frozen=True, slots=True)
class Disassembly:
    """`registers` a thread, `stack` in bytes a thread, and how often the code holds each instruction of interest."""

    registers: int
    stack: int
    tensor_cores: dict[str, int]
    loop_loads: int
    loop_stores: int


def read(text: str) -> Disassembly:
    """The findings of all functions of a cubin together.

    Raises:
        ValueError: a text without resources or without code.
    """
    resources = [(int(registers), int(stack)) for registers, stack in _RESOURCES.findall(text)]
    functions = [list(_instructions(part)) for part in _FUNCTION.split(text)[1:]]
    if not resources or not any(functions):
        raise ValueError("cuobjdump shows no resources or no code for the kernel; allowed is a cubin of one.")
    products = Counter(i.opcode for code in functions for i in code if TENSOR_CORE.fullmatch(i.opcode))
    again = Counter(i.opcode for code in functions for i in in_loops(code))
    return Disassembly(
        registers=max(registers for registers, _ in resources),
        stack=max(stack for _, stack in resources),
        tensor_cores=dict(sorted(products.items())),
        loop_loads=again["LDL"],
        loop_stores=again["STL"],
    )


def _instructions(function: str) -> Iterator[Instruction]:
    for address, guard, opcode, operands in _INSTRUCTION.findall(function):
        yield Instruction(int(address, 16), opcode, operands.strip(), bool(guard))


def in_loops(code: list[Instruction]) -> list[Instruction]:
    """The instructions of one function that can be executed more than once."""
    targets = {instruction.jumps_to for instruction in code}
    blocks: list[list[Instruction]] = [[]]
    for instruction in code:
        if instruction.address in targets and blocks[-1]:
            blocks.append([])
        blocks[-1].append(instruction)
        if instruction.jumps_to is not None or not instruction.falls_through:
            blocks.append([])
    blocks = [block for block in blocks if block]
    number = {block[0].address: i for i, block in enumerate(blocks)}
    # Bit j of reached[i]: from block i, block j can be reached by one branch or more.
    reached = [0] * len(blocks)
    for i, block in enumerate(blocks):
        if block[-1].falls_through and i + 1 < len(blocks):
            reached[i] |= 1 << (i + 1)
        if (target := block[-1].jumps_to) in number:
            reached[i] |= 1 << number[target]
    for via in range(len(blocks)):
        for i in range(len(blocks)):
            if reached[i] >> via & 1:
                reached[i] |= reached[via]
    return [instruction for i, block in enumerate(blocks) if reached[i] >> i & 1 for instruction in block]
