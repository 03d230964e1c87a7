"""Text from a trained model, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .device import to_device
from .errors import UserError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

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
    window: int | None = None,
    device: torch.device | None = None,
) -> Iterator[str]:
    """Yield the continuation of `prompt` one token at a time, as text; a token may yield an empty string.

    An empty prompt begins a new document. The stream ends after `max_new_tokens` or when the document does. The model
    sees at most `window` tokens (its max_position unless given; best the context that it was trained with): a text
    that outgrows them goes on from its last half window. `device` is where the model is (the CPU unless given).

    Errors: UserError for a prompt that is no text, or a model that cannot go on.
    """
    import torch

    device = device or torch.device("cpu")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt is not UTF-8 text: character {error.start + 1} of it is {prompt[error.start]!r}"
        ) from None
    if model.config.max_position < 2:
        raise UserError(f"a model with a max_position of {model.config.max_position} has no room to continue a text")
    ids = tokenizer.encode(prompt).astype(np.int64)
    if len(ids) == 0:
        ids = np.array([tokenizer.separator])
    window = max(2, min(window or model.config.max_position, model.config.max_position))
    decoder = tokenizer.decoder()
    left = max_new_tokens
    while left > 0:
        if len(ids) >= window:
            ids = ids[-(window // 2) :]
        count = min(left, window - len(ids))
        prefix = to_device(ids[None], device)
        sampled = []
        try:
            for token in model.generate(prefix, count, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed):
                if token == tokenizer.separator:
                    left = 0
                    break
                sampled.append(token)
                yield decoder.feed(token)
        except FloatingPointError as error:
            raise UserError(str(error)) from None
        left -= len(sampled)
        ids = np.concatenate([ids, np.array(sampled, dtype=np.int64)])
        seed = None if seed is None else seed + 1
    yield decoder.finish()
