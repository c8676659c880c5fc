"""Floating-point operations that a pass needs, whoever runs it: what a time is compared with the machine's rate by.

A multiply-add counts as two. Counted are matrix products; top-k, softmax, norms and gathers are not, so that a share of
the machine's rate says how far a pass is from being bound by arithmetic. Attention counts the pairs that must be seen:
causal ones, or min(t, k) selected ones a row in absorbed form, where query and latent meet in D = kv_lora_rank + rope
columns. A backward counts the scores that it computes again (docs of the kernels: 3 D + 2 C columns a pair); the KL
step counts, a pair, the target and five products of the indexer's width (scores, twice again, dq, dk).
"""

from reference import DeepseekV32Config

from .point import FORWARD, WARM_UP, operator_of


def model_flop(config: DeepseekV32Config, pass_: str, length: int, batch: int, *, dense: bool) -> float:
    """FLOP of one pass over `[batch, length]` tokens; `dense`: MHA over all causal pairs and no indexer.

    In the warm-up step attention is dense whatever `dense` says.
    """
    c = config
    layers = c.num_hidden_layers
    tokens = batch * length
    causal = batch * length * (length + 1) / 2
    k = min(c.index_topk, length)
    selected = batch * (k * (k + 1) / 2 + (length - k) * k)
    heads, nope, rope, value, latent = (
        c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank,
    )  # fmt: skip
    index_width = c.index_n_heads * c.index_head_dim

    # Weights that a token passes, outside the indexer.
    projections = (
        c.hidden_size * (c.q_lora_rank + latent + rope)
        + c.q_lora_rank * heads * (nope + rope)
        + heads * latent * (nope + value)
        + heads * value * c.hidden_size
    )
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    sparse_ffn = c.hidden_size * c.n_routed_experts + expert * (c.num_experts_per_tok + c.n_shared_experts)
    dense_layers = min(c.first_k_dense_replace, layers)
    weights = layers * projections
    weights += dense_layers * 3 * c.hidden_size * c.intermediate_size + (layers - dense_layers) * sparse_ffn
    head = c.hidden_size * c.vocab_size
    indexer = layers * (c.q_lora_rank * index_width + c.hidden_size * (c.index_head_dim + c.index_n_heads))

    mha = layers * causal * 2 * heads * (nope + rope + value)
    if pass_ == WARM_UP:
        target = layers * causal * 2 * heads * (nope + rope)
        # The indexer's inputs are detached: its weights get gradients, what feeds them does not.
        return 2 * tokens * (weights + 2 * indexer) + mha + target + 5 * layers * causal * 2 * index_width
    width = latent + rope
    if dense:
        forward = 2 * tokens * (weights + head) + mha
        backward = 4 * tokens * (weights + head) + layers * causal * 2 * heads * (3 * (nope + rope) + 2 * value)
    else:
        forward = 2 * tokens * (weights + head + indexer)
        forward += layers * (causal * 2 * index_width + selected * 2 * heads * (width + latent))
        # The LM loss does not reach the indexer.
        backward = 4 * tokens * (weights + head) + layers * selected * 2 * heads * (3 * width + 2 * latent)
    return forward if pass_ == FORWARD else forward + backward


def operator_flop(config: DeepseekV32Config, pass_: str, length: int, batch: int) -> float:
    """FLOP of one operator over `[batch, length]` causal rows, with its backward when that is a part of the pass.

    The KL makes its target once, and the index scores twice in dense mode (their logsumexp comes first) and once on
    selected keys; its backward makes them again, and dq and dk.
    """
    c = config
    name, backward = operator_of(pass_)
    k = min(c.index_topk, length)
    causal = batch * length * (length + 1) / 2
    selected = batch * (k * (k + 1) / 2 + (length - k) * k)
    heads, index_width = c.num_attention_heads, c.index_n_heads * c.index_head_dim
    latent, width = c.kv_lora_rank, c.kv_lora_rank + c.qk_rope_head_dim
    query, value = c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    pairs, columns, more = {
        "indexer_topk": (causal, index_width, 0),
        "sparse_mla": (selected, heads * (width + latent), heads * (3 * width + 2 * latent)),
        "dense_mla": (causal, heads * (query + value), heads * (3 * query + 2 * value)),
        "indexer_kl": (causal, heads * query + 2 * index_width, 3 * index_width),
        "indexer_kl_selected": (selected, heads * width + index_width, 3 * index_width),
    }[name]
    return 2 * pairs * (columns + (more if backward else 0))
