"""What a compiled kernel may take of a GPU, and where one may take more, with the measurement that justifies it.

The rule, for every kernel on every target: the registers that a thread gets, no stack, nothing spilled inside a loop,
no more shared memory than a block gets, and matrix products on the tensor cores of that generation. A stack is where
the assembler spills; outside loops that costs a few instructions a program. Which kernels spill depends on the pair
of Triton and ptxas, so an allowance holds for one pair alone.

The measurements: `v32 kernels` prints them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from reports.schema import Measure, NullCandidate

# Each target by the number of its architecture, as Triton counts.
TARGETS = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100}
# What an instruction can name, and what the threads of a block share.
THREAD_REGISTERS = 255
BLOCK_REGISTERS = 65_536
# Columns of the tensor memory that a block of sm_100a can allocate.
TENSOR_MEMORY = 512
# From this architecture on, products of 64 rows or more have units that HMMA does not reach, and are slow without them.
WARP_GROUPS = 90

# Measures whose budget is none at all, by the names that the table looks for.
NO_TENSOR_CORES = "no tensor-core instruction"
LARGE_HMMA = "large products on HMMA"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a compiled kernel takes.

    `registers` a thread; `stack` and `shared` in bytes, a thread and a block; `tensor_memory` in columns;
    `instructions`: how often the code holds each tensor-core instruction; `large_hmma`: matrix products of at least 64
    rows in 16 or 8 bits that became HMMA; `loop_loads`, `loop_stores`: local-memory accesses of the code in loops.
    """

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    instructions: Mapping[str, int]
    large_hmma: int
    loop_loads: int
    loop_stores: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What a kernel may take at most, in the units of `Measured`; None: not judged."""

    shared: int
    registers: int
    stack: int = 0
    loop_spills: int = 0
    tensor_memory: int | None = None
    large_hmma: int | None = None
    tensor_cores: bool = True


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one kernel may take beyond the rule, in the units of `Measured`, and what was measured."""

    stack: int
    why: str
    loop_spills: int = 0


# Compilers as `v32 kernels` names them; each target has a ptxas of its own.
_NEW = "Triton 3.9, ptxas 13.4"
_OLD = "Triton 3.6, ptxas 12.8"

# By kernel, target and compilers. A loop that loads and never stores loads what does not change, such as addresses.
ALLOWANCES: dict[tuple[str, str, str], Allowance] = {
    ("dense_mla.dkv", "sm_90a", _NEW): Allowance(80, "Of 1,816 instructions, the 653 in loops leave the stack alone."),
    ("dense_mla.dkv", "sm_90a", _OLD): Allowance(64, "Of 2,064 instructions, the 758 in loops leave the stack alone."),
    ("dense_mla.dkv.selected", "sm_90a", _NEW): Allowance(
        112, "4 loads among the 801 instructions in loops, no store; with Triton 3.6 none.", loop_spills=4
    ),
    ("dense_mla.dkv.selected", "sm_90a", _OLD): Allowance(
        56, "Of 2,424 instructions, the 966 in loops leave the stack alone."
    ),
    ("dense_mla.forward.selected", "sm_80", _OLD): Allowance(
        56, "2 loads among the 811 instructions in loops, no store; with Triton 3.9 there is no stack.", loop_spills=2
    ),
    ("indexer_kl.dense_target_576", "sm_90a", _NEW): Allowance(
        8, "Of 1,384 instructions, the 517 in loops leave the stack alone."
    ),
    # A tile of 16 keys loads nothing in the loop (24 bytes of stack), with 74 matrix instructions for half the keys.
    ("sparse_mla.forward", "sm_90a", _NEW): Allowance(
        88, "5 loads among the 1,019 instructions in loops, no store; with Triton 3.6 there is no stack.", loop_spills=5
    ),
}


def budget_for(
    kernel: str, target: str, toolchain: str, *, shared_memory: int, num_warps: int, tensor_cores: bool
) -> Budget:
    """The budget of `kernel` on `target`, compiled by `toolchain`.

    `shared_memory`: bytes that a block gets there; `num_warps` of a block; `tensor_cores`: whether it has products.
    """
    architecture = TARGETS[target]
    budget = Budget(
        shared=shared_memory,
        registers=min(THREAD_REGISTERS, BLOCK_REGISTERS // (32 * num_warps)),
        tensor_memory=TENSOR_MEMORY if architecture >= 100 else None,
        large_hmma=0 if tensor_cores and architecture >= WARP_GROUPS else None,
        tensor_cores=tensor_cores,
    )
    allowed = ALLOWANCES.get((kernel, target, toolchain))
    return budget if allowed is None else replace(budget, stack=allowed.stack, loop_spills=allowed.loop_spills)


def measures(measured: Measured, budget: Budget) -> tuple[Measure, ...]:
    """Every number that is judged, with its budget."""
    found = [
        Measure("registers", measured.registers, budget.registers),
        Measure("stack", measured.stack, budget.stack, "B"),
        Measure("shared memory", measured.shared, budget.shared, "B"),
        Measure("spills in loops", measured.loop_loads + measured.loop_stores, budget.loop_spills),
    ]
    if budget.tensor_memory is not None:
        found.append(Measure("tensor memory", measured.tensor_memory, budget.tensor_memory, "columns"))
    if budget.tensor_cores:
        found.append(Measure(NO_TENSOR_CORES, 0.0 if measured.instructions else 1.0, 0.0))
    if budget.large_hmma is not None:
        found.append(Measure(LARGE_HMMA, measured.large_hmma, budget.large_hmma))
    return tuple(found)


def within(measured: Measured, budget: Budget) -> bool:
    """Whether no number is beyond its budget."""
    return all(measure.within for measure in measures(measured, budget))


def null_candidates(measured: Measured, budget: Budget) -> tuple[NullCandidate, ...]:
    """The kernel as it would be with one fault each, and whether the budget rejects that."""
    wrong = {
        f"{budget.registers + 1} registers": replace(measured, registers=budget.registers + 1),
        "1,024 more bytes of stack": replace(measured, stack=measured.stack + 1024),
        "one byte too much shared memory": replace(measured, shared=budget.shared + 1),
        "100 more spills in loops": replace(measured, loop_loads=measured.loop_loads + 100),
    }
    if budget.tensor_memory is not None:
        wrong["one column too much tensor memory"] = replace(measured, tensor_memory=budget.tensor_memory + 1)
    if budget.tensor_cores:
        wrong["no tensor-core instruction"] = replace(measured, instructions={})
    if budget.large_hmma is not None:
        wrong["a large product on HMMA"] = replace(measured, large_hmma=measured.large_hmma + 1)
    return tuple(NullCandidate(kind, not within(candidate, budget)) for kind, candidate in wrong.items())
