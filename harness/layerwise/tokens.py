"""Real text as a checkpoint's own tokens, or byte by byte where the checkpoint brings no tokenizer.

Letters: B batch, L tokens.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from reference import DeepseekV32Config
from reports.strict_json import JSON

from ..text import BOS, standard_library, text_batch

TOKENIZER_FILE = "tokenizer.json"
# More characters than any tokenizer here puts into one token on average.
_CHARACTERS_A_TOKEN = 16
AS_BYTES = (
    "bytes; the ids of a larger vocabulary mean other things, so that the loss says nothing of the weights: "
    "put the checkpoint's tokenizer.json beside it"
)


def tokens(
    directory: Path, config: DeepseekV32Config, batch: int, length: int, seed: int
) -> tuple[torch.Tensor, dict[str, JSON]]:
    """Token ids `[B, L]`, a row from another place of the text each, and what a record says of them.

    With a `tokenizer.json` beside the weights they are its tokens behind the config's bos, if it has one. Without it
    they are bytes behind a bos of 256: right for a byte vocabulary, and for any other one only real text's repetitions.
    "loss_means" in the record says whether a loss on them is that of text.

    Raises:
        ValueError: a tokenizer that cannot be read or does not belong to the config; a vocabulary too small for bytes.
    """
    corpus = standard_library()
    said: dict[str, JSON] = {"source": "Python standard library", "files": corpus.files, "sha256": corpus.sha256}
    path = directory / TOKENIZER_FILE
    if path.is_file():
        ids = _own_tokens(path, config, batch, length, seed)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return ids, {**said, "tokens": TOKENIZER_FILE, "tokenizer_sha256": digest, "loss_means": True}
    if config.vocab_size <= BOS:
        raise ValueError(
            f"vocab_size is {config.vocab_size}, and there is no {TOKENIZER_FILE} beside the weights: bytes need {BOS + 1} ids or more."
        )
    of_bytes = config.bos_token_id == BOS
    return text_batch(batch, length, seed), {
        **said, "tokens": "bytes" if of_bytes else AS_BYTES, "loss_means": of_bytes,
    }  # fmt: skip


def _own_tokens(path: Path, config: DeepseekV32Config, batch: int, length: int, seed: int) -> torch.Tensor:
    try:
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
    # The tokenizers package raises Exception itself.
    except Exception as error:
        raise ValueError(f"Tokenizer {path} cannot be read: {' '.join(str(error).split())}.") from error
    corpus = standard_library().data.decode("utf-8", "replace")
    wanted = length * _CHARACTERS_A_TOKEN
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, max(len(corpus) - wanted, 1), (batch,), generator=generator).tolist()
    front = [] if config.bos_token_id is None else [int(config.bos_token_id)]
    rows = []
    for start in starts:
        ids = tokenizer(corpus[start : start + wanted], add_special_tokens=False)["input_ids"]
        rows.append([*front, *ids][:length])
        if len(rows[-1]) < length:
            raise ValueError(
                f"Tokenizer {path} makes {len(rows[-1])} tokens of {wanted} characters; {length} are needed."
            )
    ids_BL = torch.tensor(rows, dtype=torch.long)
    if int(ids_BL.max()) >= config.vocab_size:
        raise ValueError(
            f"Tokenizer {path} gives token id {int(ids_BL.max())}, but vocab_size is {config.vocab_size}: it belongs to another model."
        )
    return ids_BL
