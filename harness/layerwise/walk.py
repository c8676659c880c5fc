"""The walk: layer after layer is read, run by three models on the same hidden states, judged, and let go.

Beside a layer's weights as they were read stands one model of that layer at a time. The two references share those
weights; only the subject has a copy of its own, as every subject has.

Letters: B batch, L tokens, M hidden_size, W vocabulary.
"""

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from reference import DeepseekV32Config
from reference.losses import causal_lm_loss
from reference.moe import RMSNorm
from reports.records import Status, Verdict

from ..checks.base import Answer
from ..rowwise import build_rowwise
from ..runner import status_of, why_vacuous
from ..subjects import Subject
from .judge import FAMILY, Runs, judge, placed, stages_of
from .layer import LayerFiles, LayerRun, NoSuchPartError, one_layer, run_layer

# Rows of logits at a time: at a vocabulary of 129,280 they are 0.13 GB in fp32.
LOGIT_ROWS = 256


@dataclass(frozen=True, slots=True)
class Walk:
    """Who is compared, on what: the subject, the files, and a seed for the null candidates.

    `reproduce` gives, for a layer, the command that walks as far as it.
    """

    subject: Subject
    files: LayerFiles
    seed: int
    reproduce: Callable[[int], str]

    @property
    def config(self) -> DeepseekV32Config:
        """Of the checkpoint."""
        return self.files.config

    @torch.no_grad()
    def embedded(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The first layer's input `[B, L, M]` in fp32."""
        table_WM = self.files.read("model.embed_tokens.weight")
        return F.embedding(ids_BL.to(self.files.device), table_WM).float()

    def layer(self, index: int, x_BLM: torch.Tensor) -> "WalkedLayer":
        """Run the three models on layer `index`; the verdicts are then in what this returns.

        Raises:
            ValueError: a file that has been cut, or a subject that cannot be looked into.
        """
        dtype, device = self.files.dtype, self.files.device
        ids_BL = torch.arange(x_BLM.shape[0] * x_BLM.shape[1], device=device).view(x_BLM.shape[:2])
        config = one_layer(self.config, index, ids_BL.numel())
        state = self.files.layer(index, x_BLM)
        exact = run_layer(build_rowwise(config, state, device, torch.float64), ids_BL, dtype, router=True)
        _freed(device)
        low = run_layer(build_rowwise(config, state, device, dtype), ids_BL, dtype, exact, router=True)
        _freed(device)
        problem: Exception | None = None
        try:
            seen = run_layer(self._subject_module(config, state), ids_BL, dtype, exact)
        except (NoSuchPartError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            problem, seen = error, LayerRun()
        del state
        _freed(device)
        runs = Runs(config, index, dtype, device, exact, low, seen, self.seed)
        return WalkedLayer(self, runs, problem)

    def _subject_module(self, config: DeepseekV32Config, state: dict[str, torch.Tensor]) -> nn.Module:
        return self.subject.build(config, state, self.files.device, self.files.dtype).eval()

    @torch.no_grad()
    def lm_loss(self, x_BLM: torch.Tensor, ids_BL: torch.Tensor) -> float:
        """The reference's LM loss on the text, in nats a token, from the last layer's output; rows a few at a time."""
        norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight = nn.Parameter(self.files.read("model.norm.weight").float(), requires_grad=False)
        head_WM = self.files.head().float()
        normed_BLM, ids_BL = norm(x_BLM), ids_BL.to(x_BLM.device)
        total, rows = 0.0, 0
        for first in range(0, ids_BL.shape[1] - 1, LOGIT_ROWS):
            # One row more, whose label is the last one's next token.
            part = slice(first, first + LOGIT_ROWS + 1)
            labels_BL = ids_BL[:, part]
            count = labels_BL.shape[0] * (labels_BL.shape[1] - 1)
            logits_BLW = F.linear(normed_BLM[:, part], head_WM)
            total += count * float(causal_lm_loss(logits_BLW, labels_BL, torch.ones_like(labels_BL, dtype=torch.bool)))
            rows += count
        return total / rows


@dataclass(frozen=True, slots=True)
class WalkedLayer:
    """A layer that has been run: its verdicts, and the next layer's input."""

    walk: Walk
    runs: Runs
    problem: Exception | None

    @property
    def next_BLM(self) -> torch.Tensor:
        """What the fp64 reference made of the layer, in fp32."""
        assert self.runs.exact.output_BLM is not None
        return self.runs.exact.output_BLM.float()

    @property
    def stages(self) -> tuple[str, ...]:
        """What is judged of it."""
        return stages_of(self.walk.config, self.runs.layer)

    def verdict(self, stage: str) -> Verdict:
        """The verdict on one stage."""
        started = time.perf_counter()
        answer: Answer | None = Answer([], [])
        data: dict[str, object] = {"layer": self.runs.layer}
        if self.problem is not None:
            status = Status.FAILED
            answer = Answer([], [], f"the subject raised {type(self.problem).__name__}: {self.problem}")
            data["traceback"] = "".join(traceback.format_exception(self.problem))
        else:
            answer = judge(stage, self.runs)
            if answer is None:
                status, answer = (
                    Status.NOT_APPLICABLE,
                    Answer([], [], "the subject's forward has no output_indexer_scores"),
                )
            else:
                status = status_of(answer.measures, answer.nulls)
                data["stages"] = list(placed(stage, self.runs.layer, answer))
        return Verdict(
            check=f"{FAMILY}.{stage}",
            family=FAMILY,
            subject=self.walk.subject.name,
            case=f"layer {self.runs.layer}",
            status=status,
            dtype=str(self.runs.dtype).removeprefix("torch."),
            device=str(self.runs.device),
            reason=answer.reason or why_vacuous(answer.nulls, status),
            measures=tuple(answer.measures),
            nulls=tuple(answer.nulls),
            seconds=time.perf_counter() - started,
            reproduce=self.walk.reproduce(self.runs.layer),
            data=data,
        )


def _freed(device: torch.device) -> None:
    """Lets go of the last model, which lies in cycles, before the next is made: two would not fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
