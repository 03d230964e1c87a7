"""Text from a trained model, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import UserError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..models.grok import Grok


def stream(
    model: Grok,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 400,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the continuation of `prompt` one token at a time, as text; a token may yield an empty string.

    An empty prompt begins a new document. The stream ends after `max_new_tokens` or when the document does.
    """
    import torch

    ids = tokenizer.encode(prompt).astype("int64")
    if len(ids) == 0:
        ids = ids.__class__((1,), dtype="int64")
        ids[0] = tokenizer.separator
    limit = model.config.max_position
    if len(ids) + max_new_tokens > limit:
        raise UserError(
            f"the prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's {limit} positions: "
            f"ask for fewer --max-new-tokens"
        )
    decoder = tokenizer.decoder()
    for token in model.generate(
        torch.from_numpy(ids)[None], max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    ):
        if token == tokenizer.separator:
            break
        yield decoder.feed(token)
    yield decoder.finish()
