"""Grok-1: a decoder-only mixture-of-experts transformer, trained, evaluated and sampled through `grokkernels.ops`.

    h = embedding(tokens) * embedding_multiplier
    for each layer:
        h += rms_norm(attention(rms_norm(h)))     # pre_attn_norm inside, post_attn_norm outside
        h += rms_norm(experts(rms_norm(h)))       # pre_moe_norm inside, post_moe_norm outside
    logits = rms_norm(h) @ embedding.T * output_multiplier

A post-norm, its addition and the pre-norm that follows are one op, `dual_rms_norm`; so the loop in `Grok._features`
carries both the stream `h` and its norm `y`, and a layer is two branches and two such seams.

Precision: `dtype` is that of the projections, the experts, the embedding and the cache. The stream h, all norms, the
router and the logits are float32 beside it (float64 for a float64 model), and so are the parameters of the norms and of
the router. In bfloat16 this matters more than any kernel does: a rounded stream, or a router that reads a rounded norm,
sends tokens with close scores to other experts.

Source: xai-org/grok-1, whose semantics this file follows; see docs/grok.md.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from grokkernels import ops

__all__ = ["Grok", "GrokConfig", "KVCache", "Loss", "probabilities"]

ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORE_INDEX = -100


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class GrokConfig:
    """The numbers that define a model.

    Errors: TypeError or ValueError from the constructor, naming the field, its value and what is allowed.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # query head h reads key head h // (num_heads / num_kv_heads)
    head_dim: int  # num_heads * head_dim may differ from d_model
    ffn_dim: int  # of each expert
    num_experts: int = 8
    top_k: int = 2  # experts per token
    max_position: int = 8192  # longest sequence
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    embedding_multiplier: float | None = None  # None: sqrt(d_model)
    output_multiplier: float = 0.5773502691896257  # on the logits
    attention_multiplier: float | None = None  # on q.k; None: head_dim^-0.5
    attention_softcap: float = 30.0  # cap * tanh(scores / cap); 0: none
    router_softcap: float = 0.0
    final_softcap: float = 0.0  # on the logits, after output_multiplier
    activation: str = "gelu_tanh"
    tie_embeddings: bool = True  # the output matrix is the embedding

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value >= 1 << 63:
                raise ValueError(f"{name} must be below 2^63, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary embedding turns pairs), got {self.head_dim}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts = {self.num_experts}, got {self.top_k}")
        if self.embedding_multiplier is None:
            object.__setattr__(self, "embedding_multiplier", math.sqrt(self.d_model))
        if self.attention_multiplier is None:
            object.__setattr__(self, "attention_multiplier", self.head_dim**-0.5)
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
            least = "above 0" if name in _POSITIVE else "at least 0"
            if not 0 <= value <= sys.float_info.max or (name in _POSITIVE and value == 0):
                raise ValueError(f"{name} must be finite and {least}, got {value!r}")
            object.__setattr__(self, name, float(value))  # torch takes no integer above 2^63
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not isinstance(self.tie_embeddings, bool):
            raise TypeError(f"tie_embeddings must be True or False, got {self.tie_embeddings!r}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GrokConfig:
        """The configuration called `tiny`, `small` or `grok-1`, with some fields replaced.

        `tiny` learns bytes in minutes on a CPU; `small` (0.1 billion parameters) keeps Grok-1's proportions; `grok-1`
        has the published numbers (316 billion parameters: build it with `Grok(config, device="meta")`).
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All fields, as `from_dict` takes them; plain numbers, strings and booleans."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> GrokConfig:
        """The inverse of `to_dict`; fields with a default may be left out."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(fields.keys() - known.keys())
        if unknown:
            raise ValueError(f"a GrokConfig has no field {', '.join(unknown)}; it has {', '.join(known)}")
        required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in fields]
        if missing:
            raise ValueError(f"a GrokConfig needs {', '.join(missing)}")
        return cls(**fields)

    def num_parameters(self) -> int:
        """Parameters of the model, the embedding counted once when it is tied."""
        return self._count(self.num_experts)

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: all of them but the experts it is not sent to."""
        return self._count(self.top_k)

    def _count(self, experts: int) -> int:
        attention = 2 * self.d_model * self.head_dim * (self.num_heads + self.num_kv_heads)
        moe = experts * 3 * self.d_model * self.ffn_dim + self.d_model * self.num_experts
        layer = attention + moe + 4 * self.d_model
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.d_model
        return self.num_layers * layer + embeddings + self.d_model


_COUNTS = (
    "vocab_size",
    "d_model",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_dim",
    "num_experts",
    "top_k",
    "max_position",
)
_POSITIVE = ("rope_base", "norm_eps", "embedding_multiplier", "output_multiplier", "attention_multiplier")
_NOT_NEGATIVE = ("attention_softcap", "router_softcap", "final_softcap")

PRESETS: dict[str, dict[str, Any]] = {
    # For bytes, on two slow cores: 3.4 million parameters, 1.0 million of them active.
    "tiny": {
        "vocab_size": 256,
        "d_model": 128,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "ffn_dim": 256,
        "max_position": 512,
    },
    # Grok-1's proportions: 6 query heads per key head, heads that fill the width, an expert 16/3 as wide as the model.
    "small": {
        "vocab_size": 32768,
        "d_model": 384,
        "num_layers": 6,
        "num_heads": 6,
        "num_kv_heads": 1,
        "head_dim": 64,
        "ffn_dim": 2048,
        "max_position": 2048,
    },
    # As published. The multipliers are sqrt(6144), 1/sqrt(3) and 1/sqrt(128), written as in the official code.
    "grok-1": {
        "vocab_size": 131072,
        "d_model": 6144,
        "num_layers": 64,
        "num_heads": 48,
        "num_kv_heads": 8,
        "head_dim": 128,
        "ffn_dim": 32768,
        "max_position": 8192,
        "embedding_multiplier": 78.38367176906169,
        "output_multiplier": 0.5773502691896257,
        "attention_multiplier": 0.08838834764831845,
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# The model


class KVCache:
    """Keys (rotated) and values of the positions seen so far: per layer two tensors (B, max_length, Hkv, D).

    `length` positions are filled. Made by `Grok.new_cache`, filled by `model(tokens, cache=cache)`; `cache.length = 0`
    empties it, a smaller length forgets the last positions.
    """

    def __init__(self, config: GrokConfig, batch: int, max_length: int, **kind: Any) -> None:
        shape = (batch, max_length, config.num_kv_heads, config.head_dim)
        self.keys = [torch.zeros(shape, **kind) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, **kind) for _ in range(config.num_layers)]
        self.batch = batch
        self.max_length = max_length
        self.length = 0

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, T, Hkv, D) behind the filled positions; all keys and values so far. `length` stays."""
        end = self.length + k.shape[1]
        self.keys[layer][:, self.length : end] = k
        self.values[layer][:, self.length : end] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end]


class Attention(nn.Module):
    """Causal attention with rotary embedding, grouped key heads and capped scores."""

    def __init__(self, config: GrokConfig, **kind: Any) -> None:
        super().__init__()
        self.config = config
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, width, bias=False, **kind)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False, **kind)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False, **kind)
        self.o_proj = nn.Linear(width, config.d_model, bias=False, **kind)

    def forward(
        self, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: int, cache: KVCache | None
    ) -> torch.Tensor:
        """y (B, T, C) -> (B, T, C); cos, sin (max_position, D/2)."""
        dim = self.config.head_dim
        y = y.to(self.q_proj.weight.dtype)
        q, k, v = (project(y).unflatten(-1, (-1, dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = ops.rotary(q, k, cos, sin, positions=0 if cache is None else cache.length)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        o = ops.flash_attention(
            q, k, v, causal=True, scale=self.config.attention_multiplier, softcap=self.config.attention_softcap
        )
        return self.o_proj(o.flatten(-2))


class MoE(nn.Module):
    """A router and E gated feed-forward experts, K of them for each token.

    The weights of a token's experts are their softmax probabilities among all E: they do not sum to 1.
    """

    def __init__(self, config: GrokConfig, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        experts, width, ffn = config.num_experts, config.d_model, config.ffn_dim
        self.router = nn.Parameter(torch.empty(experts, width, device=device, dtype=_stream_dtype(dtype)))
        self.gate_proj = nn.Parameter(torch.empty(experts, ffn, width, device=device, dtype=dtype))
        self.up_proj = nn.Parameter(torch.empty(experts, ffn, width, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, width, ffn, device=device, dtype=dtype))

    def forward(self, y: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """y (B, T, C), not rounded -> (B, T, C) and the `Routing`."""
        logits = F.linear(y, self.router.to(y.dtype))
        routing = ops.moe_gate(logits, self.config.top_k, softcap=self.config.router_softcap)
        out = ops.moe_experts(
            y.to(self.gate_proj.dtype),
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            routing,
            activation=self.config.activation,
        )
        return out, routing


class Layer(nn.Module):
    """The weights of one layer; `Grok._features` says how they act together."""

    def __init__(self, config: GrokConfig, device: Any, dtype: torch.dtype) -> None:
        super().__init__()

        def scale() -> nn.Parameter:
            return nn.Parameter(torch.empty(config.d_model, device=device, dtype=_stream_dtype(dtype)))

        self.pre_attn_norm = scale()
        self.attention = Attention(config, device=device, dtype=dtype)
        self.post_attn_norm = scale()
        self.pre_moe_norm = scale()
        self.moe = MoE(config, device, dtype)
        self.post_moe_norm = scale()


class Loss(NamedTuple):
    """What `Grok.loss` returns; the three losses are float32 scalars to be weighed and added."""

    loss: torch.Tensor  # mean cross entropy, in nats
    load_balance_loss: torch.Tensor  # mean over the layers; 1 when the experts are used evenly
    z_loss: torch.Tensor  # mean over the layers of the mean squared logsumexp of the router logits
    tokens_per_expert: torch.Tensor  # (L, E) int32


class Grok(nn.Module):
    """A Grok-1 shaped transformer.

    Args:
        config: its numbers.
        device, dtype: of the weights, torch's defaults unless given; dtype float32, bfloat16, float16 or float64.
            Norms and router stay float32 (float64 in a float64 model). Device "meta" allocates nothing.

    The weights are drawn by `reset_parameters` from torch's global generator. Which backend runs the ops is not the
    model's business: see `grokkernels.use`.
    """

    def __init__(
        self,
        config: GrokConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, GrokConfig):
            raise TypeError(f"config must be a GrokConfig, got {type(config).__name__}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise TypeError(f"dtype must be one of {allowed}, got {dtype!r}")
        self.config = config
        table = (config.vocab_size, config.d_model)
        self.embedding = nn.Parameter(torch.empty(table, device=device, dtype=dtype))
        self.layers = nn.ModuleList(Layer(config, device, dtype) for _ in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.empty(config.d_model, device=device, dtype=_stream_dtype(dtype)))
        self.lm_head = None if config.tie_embeddings else nn.Parameter(torch.empty(table, device=device, dtype=dtype))
        self._make_tables()
        self.reset_parameters()

    def _make_tables(self) -> None:
        cos, sin = ops.rotary_tables(
            self.config.head_dim,
            self.config.max_position,
            base=self.config.rope_base,
            device=self.embedding.device,
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Grok:
        # The rotary tables follow to another device, but not to another dtype; and a model that was built on "meta"
        # gets them with its storage.
        super()._apply(fn, recurse)
        self._make_tables()
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew: the state in which training begins.

        Every activation starts at variance 1: the embedding's deviation is 1/embedding_multiplier, a matrix's is
        1/sqrt(its inputs), and norms scale by 1. The logits' deviation is then output_multiplier, if the embedding is
        tied and embedding_multiplier is sqrt(d_model).
        """
        self.embedding.normal_(std=1 / self.config.embedding_multiplier)
        if self.lm_head is not None:
            self.lm_head.normal_(std=self.config.d_model**-0.5)
        self.final_norm.fill_(1)
        for parameter in self.layers.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (B, T) int32 or int64, each in [0, vocab_size).
            cache: the tokens continue what the cache holds; they are added to it. Nothing is differentiated then.

        Returns:
            (B, T, V), float32 (float64 for a float64 model).

        Raises:
            TypeError, ValueError: tokens of another dtype or shape, outside the vocabulary, or too many of them for
                max_position or for the cache.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            y, _ = self._features(tokens, cache)
            return self._logits(y)

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> Loss:
        """Mean cross entropy of `targets` given `tokens`, and what tells how the experts fare.

        Args:
            tokens: (B, T), as in `forward`.
            targets: (B, T) int32 or int64, the token that follows each position; -100 where none is to be learnt.
        """
        if not isinstance(targets, torch.Tensor) or targets.shape != tokens.shape:
            got = tuple(targets.shape) if isinstance(targets, torch.Tensor) else type(targets).__name__
            raise ValueError(f"targets must have the shape {tuple(tokens.shape)} of tokens, got {got}")
        self._check_ids("targets", targets, ignored=IGNORE_INDEX)
        y, routings = self._features(tokens, None)
        weight = self._output_weight()
        loss = ops.linear_cross_entropy(
            y.to(weight.dtype).flatten(0, 1),
            weight,
            targets.flatten().long(),
            softcap=self.config.final_softcap,
            logit_scale=self.config.output_multiplier,
            ignore_index=IGNORE_INDEX,
        )
        return Loss(
            loss,
            torch.stack([routing.load_balance_loss for routing in routings]).mean(),
            torch.stack([routing.z_loss for routing in routings]).mean(),
            torch.stack([routing.tokens_per_expert for routing in routings]),
        )

    def _features(self, tokens: torch.Tensor, cache: KVCache | None) -> tuple[torch.Tensor, list[Any]]:
        """The final norm's output (B, T, C), in the stream's dtype, and each layer's Routing."""
        self._check_ids("tokens", tokens)
        self._check_length(tokens, cache)
        eps = self.config.norm_eps
        stream = _stream_dtype(self.embedding.dtype)
        # A seam ends with the pre-norm that comes next: of the layer's own experts, of the next layer, at last of all.
        scales = [scale.to(stream) for layer in self.layers for scale in (layer.pre_attn_norm, layer.pre_moe_norm)]
        scales.append(self.final_norm.to(stream))

        h = F.embedding(tokens, self.embedding).to(stream) * self.config.embedding_multiplier
        y = ops.rms_norm(h, scales[0], eps)
        routings = []
        for i, layer in enumerate(self.layers):
            branch = layer.attention(y, self.cos, self.sin, i, cache)
            y, h = ops.dual_rms_norm(branch.to(stream), h, layer.post_attn_norm.to(stream), scales[2 * i + 1], eps)
            branch, routing = layer.moe(y)
            y, h = ops.dual_rms_norm(branch.to(stream), h, layer.post_moe_norm.to(stream), scales[2 * i + 2], eps)
            routings.append(routing)
        if cache is not None:
            cache.length += tokens.shape[1]
        return y, routings

    def _output_weight(self) -> torch.Tensor:
        return self.embedding if self.lm_head is None else self.lm_head

    def _logits(self, y: torch.Tensor) -> torch.Tensor:
        weight = self._output_weight()
        logits = F.linear(y.to(weight.dtype), weight).to(y.dtype) * self.config.output_multiplier
        cap = self.config.final_softcap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def _check_ids(self, name: str, ids: torch.Tensor, ignored: int | None = None) -> None:
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
            got = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(f"{name} must have shape (B, T) with T at least 1, got {tuple(ids.shape)}")
        # Only where reading the values costs nothing: a GPU would have to stop, a compiled graph would break.
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            outside = (ids < 0) | (ids >= self.config.vocab_size)
            if ignored is not None:
                outside &= ids != ignored
            if outside.any():
                allowed = f"in [0, {self.config.vocab_size})" + ("" if ignored is None else f" or {ignored}")
                raise ValueError(f"{name} must be {allowed}, got {ids[outside][0].item()}")

    def _check_length(self, tokens: torch.Tensor, cache: KVCache | None) -> None:
        batch, count = tokens.shape
        start = 0
        if cache is not None:
            start = cache.length
            if batch != cache.batch:
                raise ValueError(f"tokens must have the cache's batch of {cache.batch}, got {batch}")
            if start + count > cache.max_length:
                raise ValueError(
                    f"tokens must fit into the cache: {start} of its {cache.max_length} positions are filled, "
                    f"got {count} more"
                )
        if start + count > self.config.max_position:
            raise ValueError(
                f"tokens must not exceed max_position = {self.config.max_position}, got {start + count} positions"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_length` tokens, on the model's device, in its dtype."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not 1 <= max_length <= self.config.max_position:
            raise ValueError(
                f"max_length must be between 1 and max_position = {self.config.max_position}, got {max_length}"
            )
        dtype = self.layers[0].attention.k_proj.weight.dtype
        return KVCache(self.config, batch, max_length, device=self.embedding.device, dtype=dtype)

    def generate(
        self,
        prompt: torch.Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos: int | None = None,
    ) -> Iterator[int]:
        """Sample a continuation, token by token, as the caller asks for the next one.

        Args:
            prompt: (1, T) int32 or int64. T + max_new_tokens may not exceed max_position: the window does not slide,
                since the cached keys carry their positions.
            temperature, top_k, top_p: see `probabilities`; temperature 0 takes the likeliest token, always.
            seed: makes the continuation repeatable; None draws from torch's global generator.
            eos: the token that ends the text; it is not yielded.

        Raises:
            TypeError, ValueError: at once, not at the first token.
            FloatingPointError: the model gives logits that are no numbers.
        """
        self._check_ids("prompt", prompt)
        if prompt.shape[0] != 1:
            raise ValueError(f"prompt must have shape (1, T), got {tuple(prompt.shape)}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if prompt.shape[1] + max_new_tokens > self.config.max_position:
            raise ValueError(
                f"prompt and max_new_tokens together must not exceed max_position = {self.config.max_position}, "
                f"got {prompt.shape[1]} + {max_new_tokens}"
            )
        _check_sampling(temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self._stream(prompt, max_new_tokens, temperature, top_k, top_p, generator, eos)

    def _stream(
        self,
        tokens: torch.Tensor,
        count: int,
        temperature: float,
        top_k: int,
        top_p: float,
        generator: torch.Generator | None,
        eos: int | None,
    ) -> Iterator[int]:
        cache = self.new_cache(1, tokens.shape[1] + max(count, 1) - 1)  # the last token is not fed back
        for _ in range(count):
            with torch.no_grad():  # never held over a yield, where the caller's code runs
                y, _ = self._features(tokens, cache)
                logits = self._logits(y[0, -1]).cpu()
                if not logits.isfinite().all():
                    raise FloatingPointError(
                        "the model's logits are not all finite: its weights or multipliers are wrong"
                    )
                if temperature == 0:
                    token = int(logits.argmax())
                else:
                    p = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
                    token = int(torch.multinomial(p, 1, generator=generator))
            if token == eos:
                return
            yield token
            tokens = tokens.new_tensor([[token]])

    # -----------------------------------------------------------------------------------------------------------------
    # The official weights

    @classmethod
    def from_official(
        cls,
        config: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Grok:
        """The model of the official JAX code, from its configuration and its arrays.

        Args:
            config: keys as in the official code (emb_size, key_size, num_q_heads, ...; see `OFFICIAL_FIELDS`), with
                ffn_size or widening_factor. Other keys are not looked at.
            arrays: by their JAX names, as `transformer/decoder_layer_0/router/w`, matrices as [in, out]. If some names
                begin with "w/", as in a golden file, those are the weights and the others are left alone. float16,
                float32, float64, or bfloat16 (also as its bits in uint16).
            dtype, device: as in the constructor.

        Raises:
            ValueError: a key or an array is missing, an array is unexpected or has another shape.
            NotImplementedError: 8-bit weights.
        """
        model = cls(_official_config(config), device="meta", dtype=dtype)
        model.to_empty(device=torch.get_default_device() if device is None else device)
        if any(name.startswith("w/") for name in arrays):
            names = {name.removeprefix("w/"): name for name in arrays if name.startswith("w/")}
        else:
            names = {name: name for name in arrays}
        if any(name.endswith(".weight_i8") for name in names):
            raise NotImplementedError("arrays holds int8 weights (names ending in .weight_i8): not supported yet")
        wanted = {_official_name(name): parameter for name, parameter in model.named_parameters()}
        missing, unexpected = sorted(wanted.keys() - names.keys()), sorted(names.keys() - wanted.keys())
        if missing:
            raise ValueError(f"arrays lacks {len(missing)} of the model's {len(wanted)} arrays: {_some(missing)}")
        if unexpected:
            raise ValueError(f"arrays holds {len(unexpected)} that the model does not have: {_some(unexpected)}")
        for name, parameter in wanted.items():
            _load(name, parameter, arrays[names[name]])
        return model


def _stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the residual stream, the norms and the router, beside weights of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def _check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature!r}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0: no limit), got {top_k!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")


def probabilities(
    logits: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """The distribution to sample from: logits (V,) -> probabilities (V,), float32.

    softmax(logits / temperature), limited to the top_k likeliest tokens (0: all), then to the fewest likeliest ones
    whose probabilities (after top_k) sum to at least top_p (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751),
    normalised again. Temperature 0 puts everything on the likeliest token. Among equals the lower token goes first.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return F.one_hot(logits.argmax(), logits.shape[0]).float()
    logits = logits.float()
    temperature = max(temperature, torch.finfo(torch.float32).tiny)  # a smaller one would be divided by as 0
    # The largest becomes 0 first: the smallest temperatures then overflow to -inf, which is probability 0, not NaN.
    scaled, order = ((logits - logits.max()) / temperature).sort(descending=True, stable=True)
    if top_k:
        scaled[top_k:] = -torch.inf
    p = scaled.softmax(0)
    outside = p.cumsum(0) - p >= top_p  # by what the likelier tokens hold together
    outside[0] = False  # also where top_p is too small for float32
    p = p.masked_fill(outside, 0)
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


# ---------------------------------------------------------------------------------------------------------------------
# The official code's names

# GrokConfig's field: (the official key, its value where the official code leaves it fixed).
OFFICIAL_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "d_model": ("emb_size", None),
    "num_layers": ("num_layers", None),
    "num_heads": ("num_q_heads", None),
    "num_kv_heads": ("num_kv_heads", None),
    "head_dim": ("key_size", None),
    "num_experts": ("num_experts", None),
    "top_k": ("num_selected_experts", None),
    "max_position": ("sequence_len", 8192),
    "embedding_multiplier": ("embedding_multiplier_scale", None),
    "output_multiplier": ("output_multiplier_scale", None),
    "attention_multiplier": ("attn_output_multiplier", None),
    "rope_base": ("rope_base", 10000.0),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "attention_softcap": ("attn_softcap", 30.0),
}

OFFICIAL_NAMES = {
    "embedding": "language_model/in_out_embed/embeddings",
    "final_norm": "language_model/rms_norm/scale",
    "pre_attn_norm": "rms_norm/scale",
    "post_attn_norm": "rms_norm_1/scale",
    "pre_moe_norm": "rms_norm_2/scale",
    "post_moe_norm": "rms_norm_3/scale",
    "attention.q_proj.weight": "multi_head_attention/query/w",
    "attention.k_proj.weight": "multi_head_attention/key/w",
    "attention.v_proj.weight": "multi_head_attention/value/w",
    "attention.o_proj.weight": "multi_head_attention/linear/w",
    "moe.router": "router/w",
    "moe.gate_proj": "moe/linear/w",
    "moe.up_proj": "moe/linear_v/w",
    "moe.down_proj": "moe/linear_1/w",
}


def _official_config(config: Mapping[str, Any]) -> GrokConfig:
    fields = {name: config.get(key, default) for name, (key, default) in OFFICIAL_FIELDS.items()}
    missing = [OFFICIAL_FIELDS[name][0] for name, value in fields.items() if value is None]
    ffn = config.get("ffn_size")
    if ffn is None and "widening_factor" in config and "emb_size" in config:
        ffn = int(config["widening_factor"] * config["emb_size"]) * 2 // 3
        ffn += -ffn % 8
    if ffn is None:
        missing.append("ffn_size")
    if missing:
        raise ValueError(f"config lacks {', '.join(missing)}")
    return GrokConfig(ffn_dim=ffn, **fields)


def _official_name(name: str) -> str:
    if not name.startswith("layers."):
        return OFFICIAL_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"transformer/decoder_layer_{layer}/{OFFICIAL_NAMES[rest]}"


def _load(name: str, parameter: nn.Parameter, array: np.ndarray) -> None:
    """Copy an official array into a parameter; its matrices are [in, out], ours [out, in]."""
    target = parameter.detach()
    if name.endswith("/w"):
        target = target.transpose(-1, -2)
    if tuple(array.shape) != tuple(target.shape):
        raise ValueError(f"arrays[{name!r}] must have shape {tuple(target.shape)}, got {tuple(array.shape)}")
    kind = array.dtype.name
    if kind in ("uint16", "bfloat16"):
        source = torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    elif kind in ("float16", "float32", "float64"):
        source = torch.from_numpy(np.ascontiguousarray(array))
    else:
        raise TypeError(
            f"arrays[{name!r}] must be float16, float32, float64 or bfloat16 (or its bits in uint16), got {kind}"
        )
    target.copy_(source)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
