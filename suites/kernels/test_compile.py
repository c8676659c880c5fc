"""The compile proof: kernels with one fault each are beyond their budget, ours are not, and wrong use is one sentence.

This file is also a module of kernels: `specs` at its end offers them, and worker processes import it for that.
"""

import os
from dataclasses import replace

import pytest
from rich.console import Console

from harness.cli import main
from harness.kernels import command, sass, worker
from harness.kernels.budgets import ALLOWANCES, TARGETS, Allowance, Measured, budget_for, null_candidates, within
from harness.kernels.command import Request, chosen_of, kernels, verdict_of
from harness.kernels.worker import Job, Listing, Outcome
from reports.records import Status, read_run
from reports.view import flat

triton = pytest.importorskip("triton", reason="Triton exists for Linux only.")
tl = triton.language

COMPILERS = "Triton 3.9, ptxas 13.4"
# Of our modules, two with one kernel each: all of them take too long for every day.
QUICK = ("index_logits", "radix_topk")


@triton.jit
def product(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """c [M, N] = a [M, K] @ b [K, N], one program."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k[:, None]) * N + n[None, :])
        total += tl.dot(a, b)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def products_by_hand(a_ptr, b_ptr, c_ptr, M: tl.constexpr):
    """c [M] = Σ a [M] · b [M]: what a matrix product becomes when nothing finds it."""
    m = tl.arange(0, M)
    tl.store(c_ptr + m, tl.load(a_ptr + m).to(tl.float32) * tl.load(b_ptr + m))


@triton.jit
def of_two_lengths(a_ptr, c_ptr, M: tl.constexpr):
    """Adds tensors that do not fit: Triton refuses it."""
    tl.store(c_ptr + tl.arange(0, M), tl.load(a_ptr + tl.arange(0, M)) + tl.arange(0, 2 * M))


class Aborting:
    """Ends its process as soon as the compiler looks at it, as a failed assertion in the compiler does."""

    @property
    def arg_names(self):
        os.abort()


def of_product(name, M, N, warps=4, stages=2, **changed):
    from optimized.kernels.common import KernelSpec

    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}
    signature |= dict.fromkeys(("M", "N", "BLOCK"), "constexpr")
    spec = KernelSpec(name, product, signature, {"M": M, "N": N, "BLOCK": 64}, warps, stages)
    return replace(spec, **changed)


def specs(arch):
    """Two kernels without a fault, then one for each fault."""
    by_hand = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "M": "constexpr"}
    refused = {"a_ptr": "*fp32", "c_ptr": "*fp32", "M": "constexpr"}
    found = [
        of_product("healthy", 64, 64),
        of_product("unaligned", 64, 64, unaligned=frozenset({"K"})),
        of_product("shared", 128, 256, warps=8, stages=6),
        of_product("spilling", 128, 256),
        of_product("two-warps", 64, 64, warps=2),
        of_product("by-hand", 64, 64, function=products_by_hand, signature=by_hand, constexprs={"M": 128}),
        of_product("refused", 64, 64, function=of_two_lengths, signature=refused, constexprs={"M": 128}),
        of_product("unsigned", 64, 64, signature={"a_ptr": "*bf16"}),
    ]
    return [*found, of_product("aborting", 64, 64, function=Aborting())] if "V32_ABORTING" in os.environ else found


def run(tmp_path, modules=(__name__,), **asked):
    console = Console(file=(tmp_path / "terminal").open("w"), width=100)
    code = kernels(Request(jobs=1, out=tmp_path, modules=modules, **asked), console)
    console.file.close()
    return code, read_run(tmp_path), (tmp_path / "terminal").read_text()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Kernels of this file, of one that is not there, and some of ours, asked for where kernels are interpreted."""
    modules = (__name__, f"{__name__}_not", *(f"optimized.kernels.{name}" for name in QUICK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return run(tmp_path_factory.mktemp("planted"), modules, target="sm_90a")


def verdict(run, kernel):
    return next(v for v in run.verdicts if v.check == f"kernels.{kernel}.sm_90a")


def beyond(verdict):
    return {measure.name for measure in verdict.measures if not measure.within}


def test_a_healthy_kernel_is_verified_on_the_units_of_its_generation(planted):
    found = verdict(planted[1], "healthy")
    assert found.status is Status.VERIFIED
    assert set(found.data["instructions"]) == {"HGMMA"}
    assert all(null.rejected for null in found.nulls)
    assert {null.kind for null in found.nulls} >= {"256 registers", "no tensor-core instruction"}


def test_an_argument_that_is_not_a_multiple_of_16_is_compiled_as_such(planted):
    # Rows of a that start anywhere cannot be copied asynchronously, so that no second stage of a waits in shared memory.
    shared = {
        kernel: next(m.value for m in verdict(planted[1], kernel).measures if m.name == "shared memory")
        for kernel in ("healthy", "unaligned")
    }
    assert shared["unaligned"] < shared["healthy"]


@pytest.mark.parametrize(
    ("kernel", "measures"),
    [
        ("shared", {"shared memory"}),
        ("spilling", {"stack", "spills in loops"}),
        ("two-warps", {"large products on HMMA"}),
        ("by-hand", {"no tensor-core instruction"}),
    ],
)
def test_a_fault_is_beyond_its_budget_and_nothing_else_is(kernel, measures, planted):
    found = verdict(planted[1], kernel)
    assert found.status is Status.FAILED
    assert beyond(found) == measures


@pytest.mark.parametrize(
    ("kernel", "says"),
    [("refused", "256"), ("unsigned", "signature of unsigned is ['a_ptr']; the arguments are ['a_ptr', 'b_ptr'")],
)
def test_what_does_not_compile_fails_with_what_the_compiler_said(kernel, says, planted):
    found = verdict(planted[1], kernel)
    assert found.status is Status.FAILED
    assert found.reason.startswith("does not compile: ")
    assert says in found.reason


def test_a_module_that_cannot_be_imported_is_an_error_and_the_others_are_compiled(planted):
    found = planted[1].verdicts[0]
    assert found.status is Status.ERROR
    assert "test_compile_not cannot say which kernels it has: ModuleNotFoundError" in found.reason


def test_the_table_shows_each_number_against_its_budget_and_the_run_fails(planted):
    code, records, text = planted
    assert code == 1
    line = next(line for line in text[text.index("\nspilling") :].splitlines() if "sm_90a" in line)
    stack = next(measure for measure in verdict(records, "spilling").measures if measure.name == "stack")
    assert f" {stack.value:,.0f}/0 " in line
    assert "/232,448 " in line
    assert "failed" in line
    assert text.splitlines()[-1].startswith("verified 4 · failed 6 · vacuous 0 · error 1")


def without_tools(modules, targets):
    """What a worker answers where Triton came without its tools."""
    raise RuntimeError("Cannot find cuobjdump")


@pytest.mark.slow
def test_where_the_tools_are_missing_one_sentence_says_so(capsys, monkeypatch):
    monkeypatch.setattr(worker, "list_jobs", without_tools)
    code, sentence = v32(capsys, "kernels", "--jobs", "1")
    assert code == 3
    assert "Triton cannot compile here, see v32 doctor: Cannot find cuobjdump" in sentence


@pytest.mark.slow
def test_a_compiler_that_aborts_fails_its_kernel_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("V32_ABORTING", "1")
    _, records, _ = run(tmp_path, target="sm_90a", only="aborting,healthy")
    assert verdict(records, "aborting").reason == "does not compile: the compiler ended its process"
    assert verdict(records, "healthy").status is Status.VERIFIED


@pytest.mark.parametrize("kernel", QUICK)
def test_some_of_our_kernels_compile_within_their_budgets(kernel, planted):
    assert verdict(planted[1], kernel).status is Status.VERIFIED


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_all_of_our_kernels_compile_within_their_budgets(target, tmp_path):
    code, records, text = run(tmp_path, modules=(), target=target)
    assert code == 0, text
    # An allowance that nothing needs any more hides the next spill.
    judged = {(flat(v.data["kernel"]), target, v.case): v for v in records.verdicts}
    compilers = {v.case for v in records.verdicts}
    for key, allowance in ALLOWANCES.items():
        if key[1] == target and key[2] in compilers:
            found = {measure.name: measure.value for measure in judged[key].measures}
            assert (found["stack"], found["spills in loops"]) == (allowance.stack, allowance.loop_spills), key


FOUND = Measured(168, 0, 65_536, 0, {"HGMMA": 8}, 0, 0, 0)
JOB = Job("optimized.kernels.some", "some", "sm_90a", 4, True, 232_448)


def judged(found=FOUND, job=JOB):
    return verdict_of(job, Outcome(found, 0.1), COMPILERS)


@pytest.mark.parametrize("target", TARGETS)
def test_the_budget_rejects_each_null_candidate_and_takes_what_is_just_within(target):
    budget = budget_for("some", target, COMPILERS, shared_memory=166_912, num_warps=8, tensor_cores=True)
    full = replace(FOUND, registers=255, shared=166_912, tensor_memory=512)
    assert within(full, budget)
    assert all(null.rejected for null in null_candidates(full, budget))
    assert not within(replace(full, registers=256), budget)
    assert not within(replace(full, shared=166_913), budget)
    assert not within(replace(full, stack=8), budget)
    assert not within(replace(full, loop_stores=1), budget)
    assert not within(replace(full, instructions={}), budget)
    assert within(replace(full, large_hmma=4), budget) == (target == "sm_80")
    assert within(replace(full, tensor_memory=513), budget) == (target != "sm_100a")


def test_a_block_of_many_warps_has_fewer_registers_for_each_thread():
    assert judged(replace(FOUND, registers=129)).status is Status.VERIFIED
    assert judged(replace(FOUND, registers=129), replace(JOB, num_warps=16)).status is Status.FAILED
    assert judged(replace(FOUND, registers=128), replace(JOB, num_warps=16)).status is Status.VERIFIED


def test_a_kernel_without_matrix_products_needs_no_tensor_cores():
    assert judged(replace(FOUND, instructions={})).status is Status.FAILED
    assert judged(replace(FOUND, instructions={}), replace(JOB, tensor_cores=False)).status is Status.VERIFIED


def test_an_allowance_holds_for_one_kernel_one_target_and_one_pair_of_compilers(monkeypatch):
    spilling = replace(FOUND, stack=40)
    assert judged(spilling).status is Status.FAILED
    monkeypatch.setitem(ALLOWANCES, ("some", "sm_90a", COMPILERS), Allowance(40, "Measured: 40 bytes."))
    allowed = judged(spilling)
    assert (allowed.status, allowed.reason) == (Status.VERIFIED, "Measured: 40 bytes.")
    assert judged(replace(spilling, stack=48)).status is Status.FAILED
    assert judged(replace(spilling, loop_loads=1)).status is Status.FAILED
    assert judged(spilling, replace(JOB, kernel="other")).status is Status.FAILED
    assert verdict_of(JOB, Outcome(spilling, 0.1), "Triton 3.6, ptxas 12.8").status is Status.FAILED


def test_a_budget_that_takes_anything_is_vacuous(monkeypatch):
    monkeypatch.setitem(ALLOWANCES, ("some", "sm_90a", COMPILERS), Allowance(4096, "Anything goes."))
    assert judged(replace(FOUND, stack=40)).status is Status.VACUOUS


# A loop that waits: its retry lies behind the end, and jumps back to where the loop goes on. Only L2's body is a loop;
# the code between there and the retry is not, although a branch goes back over it.
WAITING = """
 Function waiting:
  REG:40 STACK:16 SHARED:1024 LOCAL:0
		Function : waiting
        /*0000*/                   STL [R1], R2 ;           /* 0x0000000000000000 */
        /*0010*/                   LDL R3, [R1] ;           /* 0x0000000000000000 */
        /*0020*/              @!P6 BRA 0x00a0 ;             /* 0x0000000000000000 */
        /*0030*/                   HGMMA.64x64x16.F32 R4 ;  /* 0x0000000000000000 */
        /*0040*/                   BRA.U UP0, 0x0010 ;      /* 0x0000000000000000 */
        /*0050*/                   STL [R1+0x4], R2 ;       /* 0x0000000000000000 */
        /*0060*/               @P0 EXIT ;                   /* 0x0000000000000000 */
        /*0070*/                   LDL R3, [R1+0x4] ;       /* 0x0000000000000000 */
        /*0080*/                   EXIT ;                   /* 0x0000000000000000 */
        /*0090*/                   BRA 0x0090;              /* 0x0000000000000000 */
        /*00a0*/                   STL.64 [R1+0x8], R2 ;    /* 0x0000000000000000 */
        /*00b0*/                   BRA 0x0030 ;             /* 0x0000000000000000 */
"""


def test_spills_count_where_code_can_be_executed_again():
    found = sass.read(WAITING)
    assert (found.registers, found.stack, found.tensor_cores) == (40, 16, {"HGMMA": 1})
    assert (found.loop_loads, found.loop_stores) == (1, 1)


def test_a_call_that_goes_back_makes_a_loop_too():
    found = sass.read(WAITING.replace("BRA.U UP0, 0x0010", "CALL.REL.NOINC 0x0000"))
    assert (found.loop_loads, found.loop_stores) == (1, 2)


def test_without_the_branch_that_repeats_there_is_no_loop():
    found = sass.read(WAITING.replace("BRA.U UP0, 0x0010", "BRA.U UP0, 0x0050"))
    assert (found.loop_loads, found.loop_stores) == (0, 0)


def test_a_text_without_code_is_refused():
    with pytest.raises(ValueError, match="no resources or no code"):
        sass.read("")


LISTING = Listing((JOB, replace(JOB, kernel="another")), {"optimized.kernels.broken": "SyntaxError: x"}, {})


@pytest.mark.parametrize(
    ("only", "kernels", "problems"),
    [("all", ["some", "another"], 1), ("another", ["another"], 0), ("broken", [], 1), ("some", ["some", "another"], 0)],
)
def test_only_names_kernels_or_modules(only, kernels, problems):
    jobs, broken = chosen_of(Request(only=only), LISTING)
    assert ([job.kernel for job in jobs], len(broken)) == (kernels, problems)


@pytest.mark.parametrize(
    ("only", "says"), [("none", "'none'; modules are all, some, broken"), (",", "--only is empty")]
)
def test_only_what_is_known_can_be_named(only, says):
    with pytest.raises(ValueError, match=says):
        chosen_of(Request(only=only), LISTING)


def v32(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return ended.value.code, printed.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--target", "sm_70"], "--target names 'sm_70'; targets are all, sm_80, sm_90a, sm_100a"),
        (["--target", ""], "--target is empty"),
        (["--jobs", "-1"], "--jobs is -1"),
    ],
)
def test_wrong_usage_is_refused_in_one_sentence(words, says, capsys):
    code, sentence = v32(capsys, "kernels", *words)
    assert code == 2
    assert says in sentence


def test_where_triton_is_missing_one_sentence_says_so(capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, sentence = v32(capsys, "kernels")
    assert code == 3
    assert "triton is not installed" in sentence
