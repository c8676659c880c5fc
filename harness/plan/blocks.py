"""The tensors that a block of the model keeps for its backward, and those that are alive beside them at its fullest.

Every entry is a tensor that the optimized model makes; the sizes are of one rank. `suites/plan` compares the sums with
what torch's allocator gives out during real steps.

Letters: n query rows, s key slots, P pairs of a token and one of its experts, M hidden_size, h heads of the rank, N nope
dim, R rope dim, V v_head_dim, C kv_lora_rank, D = C + R, Q q_lora_rank, J indexer heads, E indexer head dim, K selected
keys, F width of an FFN, X routed experts, T chosen experts a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .step import INT32, INT64, WIDE, Step
from .workspace import attention_backward, attention_forward, kl_workspace, padded

# Tensor → bytes.
Bytes = Mapping[str, int]


# Inputs of matrix products, which autograd keeps for the gradients of weights and of nothing else.
INPUTS = (
    "attention output", "normed latent", "FFN's normed input", "product", "shared product", "experts' inputs",
    "received inputs", "last normed output",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Block:
    """One block of one layer, or the loss; sizes in bytes.

    kept: from the block's forward to its backward. forward, backward: the most that is alive beside what is kept,
    gradients of parameters left out; negative where a backward has set more free than it has made. of_kl: the part of
    what is kept that the backward of the indexer's loss sets free.
    """

    name: str
    kept: Bytes = field(default_factory=dict)
    forward: int = 0
    backward: int = 0
    of_kl: int = 0

    @property
    def size(self) -> int:
        """Bytes of all that is kept."""
        return sum(self.kept.values())


def attention(step: Step) -> Block:
    """Norm, MLA, indexer and its loss."""
    c, a, n, s = step.config, step.itemsize, step.rows, step.keys
    h, nope, rope, value, latent = (
        step.heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank,
    )  # fmt: skip
    width, query = latent + rope, nope + rope
    index_q, hidden = n * c.index_n_heads * c.index_head_dim, n * c.hidden_size
    kept: dict[str, int] = {}
    if step.graph:
        kept |= {
            "block input": hidden * a, "normed input": hidden * a,
            "q down": n * c.q_lora_rank * a, "q latent": n * c.q_lora_rank * a, "kv down": n * width * a,
            "norm statistics": 3 * n * WIDE,
        }  # fmt: skip
        operands = _attention_operands(step)
        kept |= {"attention output": n * h * value * a, **operands}
    elif step.kl:
        kept |= {"normed input": hidden * a, "q latent": n * c.q_lora_rank * a}
    gradients: dict[str, int] = {}
    if step.kl:
        gradients = {
            "gradient of index queries": index_q * WIDE,
            "gradient of index keys": s * padded(c.index_head_dim, step.kl_backend) * WIDE,
            "gradient of head weights": n * c.index_n_heads * WIDE,
        }  # fmt: skip
        kept |= {"index key before its norm": n * c.index_head_dim * WIDE, **gradients}
        if a < WIDE:
            kept["normed input, wide"] = hidden * WIDE
    of_kl = sum(gradients.values()) + (n * c.index_head_dim * WIDE + (hidden * WIDE if a < WIDE else 0)) * step.kl

    # Alive through the whole call, because `Projected` holds them.
    held = n * h * rope * a + s * width * a
    if step.scored:
        held += index_q * a + s * c.index_head_dim * a + n * c.index_n_heads * WIDE
    if not step.graph:
        held += hidden * a + n * h * query * a + sum(_attention_operands(step).values())
        held += 0 if step.kl else hidden * a
    elif step.path != "gathered":
        held += n * h * query * a
    output = n * h * value * a
    forward = held + output + max(attention_forward(step), kl_workspace(step) if step.kl else 0)

    backward = 0
    if step.graph and step.trains != "indexer":
        incoming = hidden * a
        freed = kept["attention output"]
        in_operator = incoming - freed + attention_backward(step)
        in_kl = incoming - freed + n * h * value * a + sum(gradients.values()) * (1 + (a if a < WIDE else 0) / WIDE)
        # When the indexer's projections are reached, attention has set all its operands free.
        queries = n * h * query * a
        in_indexer = incoming - freed - sum(_attention_operands(step).values()) + queries + 2 * index_q * a
        backward = int(max(in_operator, in_kl if step.kl else 0, in_indexer if step.kl else 0))
    elif step.kl:
        backward = int(sum(gradients.values()) * (1 + (a if a < WIDE else 0) / WIDE))
    return Block("attention", _of_frozen(step, kept), forward, backward, of_kl)


def _of_frozen(step: Step, kept: dict[str, int]) -> dict[str, int]:
    """What is kept where the weights of matrix products are frozen; oneDNN's layers do not ask."""
    if step.trains != "indexer" or step.linear == "onednn":
        return kept
    return {name: size for name, size in kept.items() if name not in INPUTS}


def _attention_operands(step: Step) -> dict[str, int]:
    """What the operator keeps, and what the projections around it keep beside it."""
    c, a, n, s, h = step.config, step.itemsize, step.rows, step.keys, step.heads
    nope, rope, value, latent = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    found = {"logsumexp": n * h * WIDE}
    if step.path == "gathered":
        found |= {
            "q": n * h * (nope + rope) * a, "absorbed q": n * h * (latent + rope) * a,
            "latents": s * (latent + rope) * a, "selection": n * step.selected * INT32,
            "attended latents": n * h * latent * a,
        }  # fmt: skip
        return found
    found |= {
        "normed latent": s * latent * a, "keys and values": s * h * (nope + value) * a,
        "queries": n * h * (nope + rope) * a, "keys": s * h * (nope + rope) * a,
    }  # fmt: skip
    if step.path == "masked":
        found["selection"] = n * step.selected * INT32
    if step.backend == "triton":
        found["output of the operator"] = n * h * value * a
    return found


def dense_ffn(step: Step) -> Block:
    """Norm and SwiGLU of a dense layer."""
    a, hidden = step.itemsize, step.rows * step.config.hidden_size
    inner = step.rows * (step.config.intermediate_size // step.layout.tp)
    kept = {}
    if step.graph:
        kept = {"FFN's block input": hidden * a, "FFN's normed input": hidden * a, **_swiglu(inner, a)}
    alive = 2 * hidden * a + (0 if step.graph else 2 * hidden * a + 4 * inner * WIDE)
    return Block("dense FFN", _of_frozen(step, kept), alive, _swiglu_backward(inner, a) + hidden * a)


def experts(step: Step) -> Block:
    """Norm, gate, routed and shared experts."""
    c, a, n, pairs = step.config, step.itemsize, step.rows, step.pairs
    hidden, routed = n * c.hidden_size, pairs * c.hidden_size
    top = n * c.num_experts_per_tok
    inner = pairs * c.moe_intermediate_size
    shared = n * (c.moe_intermediate_size * c.n_shared_experts // step.layout.tp)
    kept: dict[str, int] = {}
    if step.graph:
        kept = {
            "FFN's block input": hidden * a, "FFN's normed input": hidden * a,
            "gate scores": n * c.n_routed_experts * WIDE, "routing": top * (INT64 + 2 * WIDE),
            "order of pairs": 3 * pairs * INT64, "experts' outputs": top * c.hidden_size * WIDE,
            **_swiglu(inner, a), **{f"shared {name}": size for name, size in _swiglu(shared, a).items()},
        }  # fmt: skip
        if a < WIDE:
            if step.trains != "indexer":
                kept["normed input, wide"] = hidden * WIDE
            kept["gate's weight, wide"] = c.n_routed_experts * c.hidden_size * WIDE
        if step.linear == "blas":
            kept["experts' inputs"] = routed * a
        if step.layout.expert_parts > 1:
            # Pairs come from other ranks, and their outputs go back before they are weighed.
            kept |= {"received inputs": routed * a, "sent outputs": routed * WIDE}
    # Outputs by expert, and weighed; where nothing is recorded what would be kept is alive too.
    forward = 2 * hidden * a + routed * a + top * c.hidden_size * WIDE + hidden * WIDE
    if a < WIDE:
        forward += top * c.hidden_size * a
    if step.layout.expert_parts > 1:
        forward += routed * a + top * c.hidden_size * a
    if not step.graph:
        forward += 2 * hidden * a + top * c.hidden_size * WIDE + inner * a
        forward = max(forward, 4 * hidden * a + routed * a + 4 * inner * WIDE)
    # Of the weighed sum: the gradients of outputs and of weights are both of its summands' size.
    in_sum = 2 * top * c.hidden_size * WIDE - sum(_swiglu(shared, a).values())
    in_shared = _swiglu_backward(shared, a)
    freed = top * c.hidden_size * WIDE + sum(_swiglu(shared, a).values())
    in_routed = _swiglu_backward(inner, a) + routed * a - freed
    return Block("experts", _of_frozen(step, kept), forward, hidden * (a + WIDE) + max(in_sum, in_shared, in_routed))


def _swiglu(elements: int, a: int) -> dict[str, int]:
    """Gate, up and silu(gate) in at least fp32, and their product in the model's dtype."""
    return {"gate": elements * WIDE, "up": elements * WIDE, "activation": elements * WIDE, "product": elements * a}


def _swiglu_backward(elements: int, a: int) -> int:
    """Three gradients at once, when the product has been set free."""
    return 3 * elements * WIDE - elements * a


def head(step: Step) -> Block:
    """Final norm, logits and the LM loss. The logits stay until the step ends, as a part of the model's answer."""
    c, a, n = step.config, step.itemsize, step.rows
    hidden, scores = n * c.hidden_size, n * c.vocab_size
    kept = {"logits": scores * a}
    if step.graph:
        kept |= {"last block's output": hidden * a, "last normed output": hidden * a}
    if not step.graph:
        return Block("head", _of_frozen(step, kept), hidden * a + scores * WIDE * (1 if a == WIDE else 2), 0)
    kept["log-probabilities"] = scores * WIDE
    if step.trains == "indexer":
        # The LM loss is recorded, and nobody goes back through it.
        return Block("head", _of_frozen(step, kept), hidden * a + (0 if a == WIDE else scores * WIDE), 0)
    forward = 0 if a == WIDE else scores * WIDE
    # The gradient with respect to the log-probabilities, and the one that is made of it.
    in_loss = 2 * scores * WIDE
    return Block("head", kept, forward, in_loss)
