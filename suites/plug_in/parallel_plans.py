"""A plugged model under transformers' own plans for several ranks, against one process: a program for torchrun.

`python -m torch.distributed.run --nproc-per-node 2 -m suites.plug_in.parallel_plans FOLDER FAMILY PLAN`

The plans:

- `tensor`: heads and FFNs are divided; the ranks share a batch.
- `tensor-expert`: heads and dense FFNs are divided, and whole experts.
- `expert`: whole experts are divided, and by FSDP each parameter; each rank has rows of its own.

transformers sums the experts' outputs over the ranks where they share a batch and nothing has a gradient, and exchanges
tokens elsewhere; both are run.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

import optimized
from harness.cases import Case, build_case
from harness.subjects import load_weights
from reference import DeepseekV32ForCausalLM
from suites.plug_in.pairs import CPU, built, construct, reference_config, weights_of
from suites.plug_in.yardstick import assert_near, upstream

RANKS = 2
PLANS = {
    "tensor": {"tp_size": RANKS, "tp_plan": "auto"},
    "tensor-expert": {"tp_size": RANKS, "tp_plan": "auto", "ep_size": RANKS},
    "expert": {"fsdp_size": RANKS, "ep_size": RANKS},
}
# What a rank's answers to its own batch are called; the others are gradients, of all batches.
OF_A_BATCH = ("logits", "logits without gradients", "indexer_kl_loss")


def whole(x: Any) -> torch.Tensor:
    """A tensor with the shards of all ranks."""
    found: torch.Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def batches_of(case: Case, plan: str) -> list[dict[str, torch.Tensor]]:
    """What the ranks are given: one batch, or rows for each."""
    inputs = {"input_ids": case.input_ids, "attention_mask": case.attention_mask, "labels": case.labels}
    if plan != "expert":
        return [inputs]
    return [{name: x_BL[rank : rank + 1] for name, x_BL in inputs.items()} for rank in range(RANKS)]


def answers(model: Any, batch: dict[str, torch.Tensor], *, kl: bool) -> dict[str, torch.Tensor]:
    """Logits of the real rows, with and without gradients, the KL, and the gradients of the losses."""
    asked = {"output_indexer_kl_loss": True} if kl else {}
    real_BL = batch["attention_mask"].bool()
    with torch.no_grad():
        found = {"logits without gradients": model.eval()(**batch).logits[real_BL]}
    out = model.train()(**batch, **asked)
    (out.lm_loss + out.indexer_kl_loss if kl else out.loss).backward()
    found["logits"] = out.logits.detach()[real_BL]
    if kl:
        found["indexer_kl_loss"] = out.indexer_kl_loss.detach()[None]
    return found | {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def of_all(model: Any, batches: list[dict[str, torch.Tensor]], rank: int, *, kl: bool) -> dict[str, torch.Tensor]:
    """One process's answers to the batch of `rank`, and gradients that are the mean over all batches."""
    found = []
    for batch in batches:
        model.zero_grad()
        found.append(answers(model, batch, kl=kl))
    own = found[rank % len(batches)]
    return {n: x if n in OF_A_BATCH else torch.stack([f[n] for f in found]).mean(0) for n, x in own.items()}


def in_fp32(family: str) -> Any:
    """The reference, which takes every sum in the plain order."""
    return load_weights(DeepseekV32ForCausalLM, reference_config(family), weights_of(family), CPU, torch.float32)


def of_the_first_rank(model: Any, plan: str) -> Any:
    """The model without what the second rank holds: what comes out where nothing is exchanged."""
    with torch.no_grad():
        for layer in model.model.layers:
            if plan == "tensor":
                layer.self_attn.o_proj.weight.chunk(RANKS, 1)[1].zero_()
            elif hasattr(layer.mlp, "experts"):
                layer.mlp.experts.down_proj.chunk(RANKS, 0)[1].zero_()
    return model


def check_divided(model: Any, plan: str) -> None:
    """Each rank holds its share, and no more."""
    names = {
        "tensor": ["self_attn.kv_b_proj.weight"],
        "tensor-expert": ["self_attn.kv_b_proj.weight", "mlp.experts.gate_up_proj"],
        "expert": ["self_attn.kv_b_proj.weight", "mlp.experts.gate_up_proj"],
    }
    for name in names[plan]:
        weight = model.model.layers[-1].get_parameter(name)
        assert weight.to_local().shape[0] * RANKS == weight.shape[0], name


def check_that_experts_alone_are_refused(family: str, folder: Path) -> None:
    """transformers 5.23 itself refuses what its documentation names: experts divided on one batch, and nothing else."""
    asked = DistributedConfig(tp_size=RANKS, ep_size=RANKS, tp_plan={})
    with optimized.plug_into_transformers() as plug:
        assert "has no `tp_plan`" in refusal(construct(family).from_pretrained, folder, distributed_config=asked)
        plug.unplug()
        assert "has no `tp_plan`" in refusal(construct(family).from_pretrained, folder, distributed_config=asked)


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The sentence of the ValueError that the call ends with, or nothing."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    """All ranks; a failed assertion ends them with an error."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, family, plan = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    rank = dist.get_rank()
    assert dist.get_world_size() == RANKS
    # Where heads are divided the KL's target would lack some.
    kl = plan == "expert"
    case = build_case("left-padded", reference_config(family), seed=3, length=60)
    batches = batches_of(case, plan)
    if rank == 0:
        built(family, plugged=False).save_pretrained(folder)
    dist.barrier()

    sdpa, eager = (of_all(upstream(family, attention), batches, rank, kl=False) for attention in ("sdpa", "eager"))
    expected = of_all(built(family, plugged=True), batches, rank, kl=kl)
    # transformers has no KL: there the reference in fp32 and the model in one process are what is compared.
    other = {**of_all(in_fp32(family), batches, rank, kl=True), **eager} if kl else eager
    wrong = of_all(of_the_first_rank(built(family, plugged=True), plan), batches, rank, kl=kl)
    with optimized.plug_into_transformers():
        model = construct(family).from_pretrained(folder, distributed_config=DistributedConfig(**PLANS[plan]))
    check_divided(model, plan)
    found = answers(model, batches[rank % len(batches)], kl=kl)
    assert found.keys() == expected.keys()
    for name, answer in found.items():
        two_right_ones = (other[name], sdpa.get(name, expected[name]))
        # What lies before the first experts does not depend on them: there it is no wrong answer.
        halved = {} if torch.equal(wrong[name], expected[name]) else {"the first rank's part": wrong[name]}
        assert halved or name not in OF_A_BATCH
        assert_near(answer, expected[name], two_right_ones, halved, name)
    if kl:
        check_that_experts_alone_are_refused(family, folder)
    else:
        print(refusal(model, **case.inputs(), output_indexer_kl_loss=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
