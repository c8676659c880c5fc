"""A plugged model under transformers' tensor-parallel plan, against one process: a program for torchrun.

`python -m torch.distributed.run --nproc-per-node 2 -m suites.plug_in.tensor_parallel FOLDER`
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import DeepseekV32ForCausalLM

import optimized
from harness.cases import build_case
from suites.plug_in.pairs import built, reference_config

# fp32 sums over ranks in another order: transformers' own model differs by 2.7e-6 of a gradient's largest entry.
NEAR = 3e-5


def gradients_of(model, case):
    """Logits and whole gradients of the LM loss."""
    out = model.train()(**case.inputs(), labels=case.labels)
    out.loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def main() -> None:
    """All ranks; a failed assertion ends them with an error."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    case = build_case("left-padded", reference_config("deepseek"), seed=3, length=60)
    if dist.get_rank() == 0:
        built("deepseek", plugged=False).save_pretrained(folder)
    dist.barrier()
    logits, gradients = gradients_of(built("deepseek", plugged=True), case)
    with optimized.plug_into_transformers():
        model = DeepseekV32ForCausalLM.from_pretrained(folder, tp_plan="auto")
    assert model.model.layers[0].self_attn.kv_b_proj.weight.to_local().shape[0] * dist.get_world_size() == 4 * 40
    of_ranks, gradients_of_ranks = gradients_of(model, case)
    assert (of_ranks - logits)[case.real_BL].abs().max() < NEAR
    assert gradients_of_ranks.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (gradients_of_ranks[name] - gradient).abs().max() <= NEAR * gradient.abs().max(), name
    try:
        model(**case.inputs(), output_indexer_kl_loss=True)
    except ValueError as error:
        print(error)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
