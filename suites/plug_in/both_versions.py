"""What must hold of the plug-in under every version of transformers, as a program: `python -m suites.plug_in.both_versions`.

Prints the version at its end. A failed assertion ends it with an error.
"""

import tempfile

import torch
import transformers

import optimized
from harness.cases import build_case

from .pairs import FAMILIES, built, config_of, construct, pair, reference_config
from .yardstick import assert_near, upstream


def check_forward_and_gradients(family: str) -> None:
    """Logits, loss and gradients of padded rows."""
    case = build_case("left-padded", reference_config(family), seed=3, length=60)
    found = []
    for model in (upstream(family, "eager"), upstream(family, "sdpa"), built(family, plugged=True)):
        out = model.train()(**case.inputs(), labels=case.labels)
        out.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": out.logits[case.real_BL], "loss": out.loss[None], **gradients})
    eager, sdpa, ours = found
    assert ours.keys() == sdpa.keys()
    for name, expected in sdpa.items():
        assert_near(ours[name], expected, (eager[name], expected), name=f"{family}: {name}")


def check_generate(family: str) -> None:
    """The same tokens through dynamic and static caches."""
    theirs, ours = pair(family)
    ids = build_case("text", reference_config(family), seed=3, length=40).input_ids
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for asked in ({}, {"cache_implementation": "static"}):
        made = [
            m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **asked) for m in (theirs, ours)
        ]
        assert torch.equal(*made), (family, asked)
        assert made[0].shape[1] > 40


def check_indexer_training(family: str) -> None:
    """Both stages' loss reaches the indexers, checkpointed or not, and nothing else."""
    case = build_case("packed", reference_config(family), seed=3, length=60)
    for sparse in (True, False):
        found = []
        for reentrant in (None, False, True):
            model = built(family, plugged=True, use_sparse_attention=sparse).train()
            if reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            out = model(**case.inputs(), output_indexer_kl_loss=True)
            out.indexer_kl_loss.backward()
            reached = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
            assert reached and all(".indexer." in name for name in reached), (family, sparse, reentrant)
            assert reached.keys() == {n for n, _ in model.named_parameters() if ".indexer." in n}
            found.append(reached)
        for others in found[1:]:
            assert all(torch.equal(others[n], g) for n, g in found[0].items()), (family, sparse)


def check_seams(family: str) -> None:
    """Nothing is left behind, and a model stays what it was built as."""
    original, init = construct(family), construct(family).__init__
    with optimized.plug_into_transformers():
        held = original(config_of(family))
        auto = transformers.AutoModelForCausalLM.from_config(config_of(family))
        assert type(held) is type(auto) is not original
        with tempfile.TemporaryDirectory() as folder:
            held.save_pretrained(folder)
            loaded = original.from_pretrained(folder)
        assert type(loaded) is type(held)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), held.parameters(), strict=True))
    assert construct(family) is original
    assert original.__init__ is init
    assert transformers.monkey_patching.get_patch_mapping() == {}
    assert type(transformers.AutoModelForCausalLM.from_config(config_of(family))) is original


def main() -> None:
    """All of it, for each family."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for family in FAMILIES:
        check_forward_and_gradients(family)
        check_generate(family)
        check_indexer_training(family)
        check_seams(family)
    print(transformers.__version__)


if __name__ == "__main__":
    main()
