"""One leg of a journey between two versions of transformers: save a checkpoint with its logits, or load and compare.

`python -m suites.checkpoints.roundtrip save|load DIRECTORY` prints the version it ran under.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import optimized
import reference
from harness.cases import build_case, calibrated_state
from harness.subjects import load_weights
from reference import DeepseekV32Config

CPU = torch.device("cpu")


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Logits on one row of text past index_topk."""
    case = build_case("text", DeepseekV32Config.preset("tiny"), seed=7, length=64, batch=1)
    with torch.no_grad():
        out: torch.Tensor = model.eval()(**case.inputs()).logits
    return out


def save(directory: Path) -> None:
    """Write a calibrated checkpoint in the official layout, in fp32 and in FP8, and beside them their logits."""
    config = DeepseekV32Config.preset("tiny")
    model = load_weights(reference.DeepseekV32ForCausalLM, config, calibrated_state(config, 7), CPU, torch.float32)
    model.save_pretrained(directory / "model")  # type: ignore[operator]
    reference.save_official(model, directory / "fp8", "fp8", shard_size="100KB")  # type: ignore[arg-type]
    from_fp8 = reference.DeepseekV32ForCausalLM.from_pretrained(directory / "fp8", dtype=torch.float32)
    logits = {"logits": logits_of(model), "from fp8": logits_of(from_fp8)}
    save_file(logits, str(directory / "logits.safetensors"))


def load(directory: Path) -> None:
    """Load them, compare logits bit for bit in the reference and closely in the other models, and save the first again."""
    saved = load_file(str(directory / "logits.safetensors"))
    from_fp8 = reference.load_model_for_sft(directory / "fp8", dtype=torch.float32)
    if not torch.equal(logits_of(from_fp8), saved["from fp8"]):
        raise SystemExit("reference: logits of the FP8 checkpoint differ")
    expected = saved["logits"]
    model = reference.DeepseekV32ForCausalLM.from_pretrained(directory / "model")
    found = logits_of(model)
    if not torch.equal(found, expected):
        raise SystemExit(f"reference: logits differ by {float((found - expected).abs().max())}")
    for name, model_class in (
        ("optimized", optimized.DeepseekV32ForCausalLM),
        ("transformers", transformers.DeepseekV32ForCausalLM),
    ):
        off = float((logits_of(model_class.from_pretrained(directory / "model")) - expected).abs().max())
        if not off <= 1e-4 * float(expected.abs().max()):
            raise SystemExit(f"{name}: logits differ by {off}")
    model.save_pretrained(directory / "model")


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))
    print(transformers.__version__)
