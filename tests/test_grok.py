"""The model alone: cache, sampling, training, loading, torch.compile, bad input. Its numbers: test_grok_golden."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels.models.grok import Grok, GrokConfig, KVCache, probabilities

BACKENDS = ("reference", "cpu")
SMALL = {
    "vocab_size": 61,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_dim": 20,
    "num_experts": 4,
    "max_position": 40,
}


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    """Not the two threads of the other tests: on shared cores, models this small mostly wait for the second."""
    torch.set_num_threads(1)


def config(**fields: Any) -> GrokConfig:
    return GrokConfig.from_dict({**SMALL, **fields})


def model(seed: int = 0, dtype: torch.dtype | None = None, **fields: Any) -> Grok:
    torch.manual_seed(seed)
    return Grok(config(**fields), dtype=dtype)


def tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, count), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_grok_1_as_published() -> None:
    """Built in no time and no memory; its parameters are those of the released checkpoint's 770 arrays."""
    grok = Grok(GrokConfig.preset("grok-1"), device="meta", dtype=torch.bfloat16)
    total = sum(p.numel() for p in grok.parameters())
    assert total == grok.config.num_parameters() == 315_684_820_992
    assert grok.config.num_active_parameters() == 83_756_587_008
    assert sum(1 for _ in grok.parameters()) == 770


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}, {"num_heads": 6, "top_k": 1, "num_experts": 3}])
def test_number_of_parameters(fields: dict[str, Any]) -> None:
    grok = model(**fields)
    assert grok.config.num_parameters() == sum(p.numel() for p in grok.parameters())
    unused = grok.config.num_experts - grok.config.top_k
    expert = 3 * grok.config.d_model * grok.config.ffn_dim
    assert grok.config.num_active_parameters() == grok.config.num_parameters() - 2 * unused * expert


@pytest.mark.parametrize("name", ["tiny", "small", "grok-1"])
def test_config_survives_json(name: str) -> None:
    made = GrokConfig.preset(name, top_k=1, d_model=96)
    assert GrokConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert (made.top_k, made.d_model) == (1, 96)


def test_multipliers_follow_the_size() -> None:
    made = GrokConfig.preset("tiny", d_model=64, head_dim=16)
    assert (made.embedding_multiplier, made.attention_multiplier) == (8.0, 0.25)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads = 3, got 4"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"top_k": 5}, "top_k must be at most num_experts = 4, got 5"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"d_model": 24.0}, "d_model must be an int, got 24.0"),
        ({"vocab_size": True}, "vocab_size must be an int"),
        ({"norm_eps": 0.0}, "norm_eps must be finite and above 0, got 0.0"),
        ({"attention_softcap": -1.0}, "attention_softcap must be finite and at least 0, got -1.0"),
        ({"output_multiplier": float("nan")}, "output_multiplier must be finite"),
        ({"rope_base": "1e4"}, "rope_base must be a number"),
        ({"activation": "swish"}, "activation must be one of gelu_tanh, gelu, silu, relu, got 'swish'"),
        ({"tie_embeddings": 1}, "tie_embeddings must be True or False"),
        ({"width": 3}, "a GrokConfig has no field width; it has vocab_size"),
    ],
)
def test_bad_config(fields: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        config(**fields)


def test_bad_presets() -> None:
    with pytest.raises(ValueError, match="preset must be one of tiny, small, grok-1, got 'huge'"):
        GrokConfig.preset("huge")
    with pytest.raises(ValueError, match="a GrokConfig needs vocab_size, d_model"):
        GrokConfig.from_dict({})


# ---------------------------------------------------------------------------------------------------------------------
# Cache


def pieces(count: int, *cuts: int) -> list[slice]:
    """0 .. count, cut into slices."""
    return [slice(a, b) for a, b in itertools.pairwise([0, *cuts, count])]


SHAPES = {
    "grouped": {},
    "MHA": {"num_kv_heads": 4},
    "MQA": {"num_kv_heads": 1},
    "heads wider than the model": {"head_dim": 14},
    "odd sizes": {"d_model": 23, "num_heads": 3, "num_kv_heads": 1, "head_dim": 10, "ffn_dim": 13, "num_experts": 5},
    "one layer, one expert": {"num_layers": 1, "num_experts": 1, "top_k": 1},
    "all caps, own output matrix": {"router_softcap": 3.0, "final_softcap": 2.0, "tie_embeddings": False},
    "no cap, other GELU": {"attention_softcap": 0.0, "activation": "gelu"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cache_changes_nothing(shape: str, backend: str) -> None:
    """Prefill in pieces and token by token gives the logits of one pass; so does a cache that was cut back."""
    grok, ids = model(**SHAPES[shape]), tokens(2, 13)
    with grokkernels.use(backend):
        whole = grok(ids)
        for parts in (pieces(13, 5, 6, 8), pieces(13, *range(1, 13))):
            cache = grok.new_cache(2, 13)
            steps = torch.cat([grok(ids[:, part], cache=cache) for part in parts], dim=1)
            torch.testing.assert_close(steps, whole, rtol=1e-5, atol=2e-5)
        cache.length = 9
        torch.testing.assert_close(grok(ids[:, 9:], cache=cache), whole[:, 9:], rtol=1e-5, atol=2e-5)


@settings(max_examples=10, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 9),
    width=st.integers(1, 40),
    top_k=st.integers(1, 4),
    cut=st.integers(1, 10),
    batch=st.integers(1, 3),
)
def test_cache_on_drawn_shapes(
    kv_heads: int, group: int, half: int, width: int, top_k: int, cut: int, batch: int
) -> None:
    grok = model(num_kv_heads=kv_heads, num_heads=kv_heads * group, head_dim=2 * half, d_model=width, top_k=top_k)
    ids = tokens(batch, 11)
    cache = grok.new_cache(batch, 11)
    steps = torch.cat([grok(ids[:, part], cache=cache) for part in pieces(11, cut)], dim=1)
    torch.testing.assert_close(steps, grok(ids), rtol=1e-4, atol=1e-4)


def test_sequences_do_not_see_each_other_or_the_future() -> None:
    grok, ids = model(), tokens(2, 9)
    whole = grok(ids)
    torch.testing.assert_close(grok(ids[1:]), whole[1:])
    changed = ids.clone()
    changed[:, 6:] = 1
    torch.testing.assert_close(grok(changed)[:, :6], whole[:, :6])
    assert not torch.allclose(grok(changed)[:, 6:], whole[:, 6:])


def test_full_cache() -> None:
    grok, ids = model(), tokens(1, 8)
    cache = grok.new_cache(1, 6)
    grok(ids[:, :4], cache=cache)
    with pytest.raises(ValueError, match="4 of its 6 positions are filled, got 3 more"):
        grok(ids[:, 4:7], cache=cache)
    assert cache.length == 4
    with pytest.raises(ValueError, match="tokens must have the cache's batch of 1, got 2"):
        grok(tokens(2, 1), cache=cache)
    for batch, length in ((0, 5), (1, 0), (1, 41)):
        with pytest.raises(ValueError, match="must be"):
            grok.new_cache(batch, length)


def test_cache_carries_no_gradient() -> None:
    grok = model()
    assert not grok(tokens(1, 3), cache=grok.new_cache(1, 3)).requires_grad
    assert grok(tokens(1, 3)).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def test_generation_is_greedy_at_temperature_0() -> None:
    grok, ids = model(), tokens(1, 5)
    found = list(grok.generate(ids, 12, temperature=0))
    for token in found:
        assert token == int(grok(ids)[0, -1].argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert len(found) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_repeats_with_its_seed(dtype: torch.dtype) -> None:
    grok, ids = model(dtype=dtype), tokens(1, 5)
    first, again, other = (list(grok.generate(ids, 20, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other
    torch.manual_seed(3)
    first = list(grok.generate(ids, 20))
    torch.manual_seed(3)
    assert list(grok.generate(ids, 20)) == first


class Fixed(Grok):
    """Says the same logits at every position."""

    def _features(self, tokens: torch.Tensor, cache: KVCache | None) -> tuple[torch.Tensor, list[Any]]:
        return torch.zeros(*tokens.shape, 1), []

    def _logits(self, y: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.033, 0.533, 0.133, 0.3]),
        ({"top_k": 2, "temperature": 2.0}, [0, 0.536, 0, 0.464]),
        ({"top_p": 0.8}, [0, 0.444, 0.222, 0.333]),
    ],
)
def test_generation_follows_its_distribution(options: dict[str, float], expected: list[float]) -> None:
    drawn = list(Fixed(config(max_position=3000)).generate(tokens(1, 4), 2000, seed=0, **options))
    frequency = torch.bincount(torch.tensor(drawn), minlength=4) / 2000
    deviation = 0.5 / 2000**0.5  # at most
    torch.testing.assert_close(frequency, torch.tensor(expected), rtol=0, atol=4 * deviation)
    assert all(p > 0 for p, n in zip(expected, frequency, strict=True) if n)


def test_generation_streams_and_ends() -> None:
    grok, ids = model(), tokens(1, 5)
    text = grok.generate(ids, 30, temperature=0)
    first = [next(text) for _ in range(4)]
    with torch.enable_grad():  # the caller's own work between two tokens is not disturbed
        next(text)
        assert torch.is_grad_enabled()
    assert list(grok.generate(ids, 4, temperature=0)) == first
    stop = first[2]
    assert list(grok.generate(ids, 30, temperature=0, eos=stop)) == first[: first.index(stop)]
    assert list(grok.generate(ids, 0)) == []
    assert len(list(grok.generate(ids, 35))) == 35  # up to max_position = 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_tokens": 36}, r"together must not exceed max_position = 40, got 5 \+ 36"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be finite and at least 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"prompt": tokens(2, 5)}, r"prompt must have shape \(1, T\), got \(2, 5\)"),
        ({"prompt": tokens(1, 0)}, "prompt must have shape"),
        ({"prompt": [1, 2]}, "prompt must be an int32 or int64 tensor, got list"),
    ],
)
def test_bad_generation(arguments: dict[str, Any], words: str) -> None:
    """Refused by the call, before the first token is asked for."""
    with pytest.raises((TypeError, ValueError), match=words):
        model().generate(**{"prompt": tokens(1, 5), "max_new_tokens": 3, **arguments})


LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),  # after top_k the likeliest has 4/7
    ],
)
def test_probabilities(options: dict[str, float], expected: list[float]) -> None:
    torch.testing.assert_close(probabilities(LOGITS, **options), torch.tensor(expected, dtype=torch.float32))


def test_equals_are_taken_in_order() -> None:
    p = probabilities(torch.zeros(5), top_k=2)
    assert p.tolist() == [0.5, 0.5, 0, 0, 0]
    assert probabilities(torch.zeros(5), temperature=0).tolist() == [1, 0, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_every_parameter(backend: str, dtype: torch.dtype) -> None:
    grok = model(dtype=dtype, tie_embeddings=False)
    with grokkernels.use(backend):
        out = grok.loss(tokens(2, 30), tokens(2, 30, seed=1))
        (out.loss + 0.01 * out.load_balance_loss + 0.001 * out.z_loss).backward()
    for name, parameter in grok.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    grok, ids, targets = model(final_softcap=2.0), tokens(2, 9), tokens(2, 9, seed=1)
    targets[0, :4] = -100
    out = grok.loss(ids, targets)
    torch.testing.assert_close(out.loss, F.cross_entropy(grok(ids).flatten(0, 1), targets.flatten()))
    assert out.tokens_per_expert.shape == (2, 4)
    assert out.tokens_per_expert.sum(1).tolist() == [2 * 9 * 2] * 2
    assert out.loss.dtype == out.load_balance_loss.dtype == out.z_loss.dtype == torch.float32
    torch.testing.assert_close(grok.loss(ids.int(), targets.int()).loss, out.loss)


def test_fresh_model_is_calm() -> None:
    """At the start the loss is near ln V, every expert is in use and the logits have the deviation that is promised."""
    torch.manual_seed(0)
    grok = Grok(GrokConfig.preset("tiny"))
    ids = torch.randint(256, (4, 64))
    out = grok.loss(ids[:, :-1], ids[:, 1:])
    assert abs(out.loss.item() - np.log(256)) < 0.4
    assert out.load_balance_loss.item() < 1.5
    assert (out.tokens_per_expert > 0).all()
    assert 0.4 < grok(ids).std().item() < 0.8


def test_learns() -> None:
    grok, ids = model(), tokens(4, 20)
    optimizer = torch.optim.Adam(grok.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        out = grok.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        (out.loss + 0.01 * out.load_balance_loss).backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_gradient_against_float64() -> None:
    """The whole model's gradient along a random direction equals the slope of its loss, in float64."""
    grok, ids, targets = model(dtype=torch.float64), tokens(1, 7), tokens(1, 7, seed=1)
    with grokkernels.use("reference"):
        grok.loss(ids, targets).loss.backward()
        parameters = list(grok.parameters())
        torch.manual_seed(1)
        direction = [torch.randn_like(p) * 1e-6 for p in parameters]
        slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
        with torch.no_grad():
            ends = []
            for sign in (1, -2):
                for p, d in zip(parameters, direction, strict=True):
                    p += sign * d
                ends.append(grok.loss(ids, targets).loss)
    assert ends[0].dtype == torch.float64
    torch.testing.assert_close((ends[0] - ends[1]) / 2, slope, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def test_state_dict_round_trip(tmp_path: Path) -> None:
    grok, other = model(0), model(1)
    torch.save(grok.state_dict(), tmp_path / "weights")
    assert set(grok.state_dict()) == {name for name, _ in grok.named_parameters()}
    other.load_state_dict(torch.load(tmp_path / "weights"))
    assert torch.equal(grok(tokens(1, 5)), other(tokens(1, 5)))


def test_seed_makes_the_weights() -> None:
    for (name, a), b in zip(model(3).named_parameters(), model(3).parameters(), strict=True):
        assert torch.equal(a, b), name


def test_dtypes() -> None:
    grok = model(dtype=torch.bfloat16)
    kept = {name for name, p in grok.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in grok.named_parameters() if "norm" in name or "router" in name}
    assert grok(tokens(1, 3)).dtype == torch.float32
    assert grok.new_cache(1, 3).keys[0].dtype == torch.bfloat16
    assert model(dtype=torch.float64)(tokens(1, 3)).dtype == torch.float64


def test_converted_model_still_runs() -> None:
    """`.to(bfloat16)` rounds norms and router too; the rotary tables stay exact."""
    grok, tables = model(), model().cos
    out = copy.deepcopy(grok).to(torch.bfloat16)(tokens(1, 5))
    torch.testing.assert_close(out, grok(tokens(1, 5)), rtol=0, atol=0.2)
    assert torch.equal(grok.to(torch.bfloat16).cos, tables)


def test_meta_model_comes_to_life() -> None:
    grok = Grok(config(), device="meta").to_empty(device="cpu")
    grok.load_state_dict(model().state_dict())
    assert torch.equal(grok(tokens(1, 5)), model()(tokens(1, 5)))


OFFICIAL = {
    "vocab_size": 61,
    "emb_size": 24,
    "widening_factor": 1.3,
    "key_size": 8,
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 12,
    "num_experts": 4,
    "num_selected_experts": 2,
    "attn_output_multiplier": 0.1,
    "embedding_multiplier_scale": 5.0,
    "output_multiplier_scale": 0.5,
}


def official_arrays() -> dict[str, np.ndarray]:
    draw, ffn = np.random.default_rng(0), 24
    shapes: dict[str, tuple[int, ...]] = {
        "language_model/in_out_embed/embeddings": (61, 24),
        "language_model/rms_norm/scale": (24,),
    }
    for i in range(OFFICIAL["num_layers"]):
        layer = f"transformer/decoder_layer_{i}"
        shapes |= {f"{layer}/rms_norm{suffix}/scale": (24,) for suffix in ("", "_1", "_2", "_3")}
        shapes |= {f"{layer}/multi_head_attention/{name}/w": (24, 16) for name in ("key", "value")}
        shapes |= {f"{layer}/multi_head_attention/query/w": (24, 32), f"{layer}/router/w": (24, 4)}
        shapes |= {f"{layer}/multi_head_attention/linear/w": (32, 24), f"{layer}/moe/linear_1/w": (4, ffn, 24)}
        shapes |= {f"{layer}/moe/{name}/w": (4, 24, ffn) for name in ("linear", "linear_v")}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_official_names_and_config() -> None:
    """ffn = int(1.3 * 24) * 2 // 3 = 20, rounded up to 24; layer 10 is the eleventh; matrices are turned."""
    arrays = official_arrays()
    grok = Grok.from_official(OFFICIAL, arrays)
    assert (grok.config.ffn_dim, grok.config.norm_eps, grok.config.attention_softcap) == (24, 1e-5, 30.0)
    layer = "transformer/decoder_layer_10"
    for ours, theirs in {
        grok.layers[10].attention.q_proj.weight: arrays[f"{layer}/multi_head_attention/query/w"].T,
        grok.layers[10].attention.o_proj.weight: arrays[f"{layer}/multi_head_attention/linear/w"].T,
        grok.layers[10].moe.router: arrays[f"{layer}/router/w"].T,
        grok.layers[10].moe.gate_proj: arrays[f"{layer}/moe/linear/w"].swapaxes(1, 2),
        grok.layers[10].moe.up_proj: arrays[f"{layer}/moe/linear_v/w"].swapaxes(1, 2),
        grok.layers[10].moe.down_proj: arrays[f"{layer}/moe/linear_1/w"].swapaxes(1, 2),
        grok.layers[10].post_moe_norm: arrays[f"{layer}/rms_norm_3/scale"],
        grok.final_norm: arrays["language_model/rms_norm/scale"],
        grok.embedding: arrays["language_model/in_out_embed/embeddings"],
    }.items():
        assert torch.equal(ours.detach(), torch.from_numpy(np.ascontiguousarray(theirs)))
    assert all(p.is_contiguous() for p in grok.parameters())


def test_official_dtypes_and_prefix() -> None:
    arrays = official_arrays()
    bits = {
        name: torch.from_numpy(a).bfloat16().view(torch.int16).numpy().view(np.uint16) for name, a in arrays.items()
    }
    expected = Grok.from_official(OFFICIAL, arrays, dtype=torch.bfloat16)
    golden = {f"w/{name}": array for name, array in bits.items()} | {"tokens": np.zeros(3)}
    found = Grok.from_official(OFFICIAL, golden, dtype=torch.bfloat16)
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b.bfloat16()), name


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"transformer/decoder_layer_3/router/w": None}, ValueError, "lacks 1 of .* arrays: .*layer_3/router/w"),
        ({"transformer/decoder_layer_12/router/w": np.zeros(3)}, ValueError, "holds 1 .* not have: .*layer_12/router"),
        ({"transformer/decoder_layer_3/router/w": np.zeros((4, 24))}, ValueError, r"shape \(24, 4\), got \(4, 24\)"),
        ({"language_model/rms_norm/scale": np.zeros(24, np.int8)}, TypeError, "or its bits in uint16.*got int8"),
        ({"transformer/x/w.weight_i8": np.zeros(3, np.int8)}, NotImplementedError, "int8 weights"),
    ],
)
def test_bad_official_arrays(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arrays = {name: array for name, array in (official_arrays() | change).items() if array is not None}
    with pytest.raises(error, match=words):
        Grok.from_official(OFFICIAL, arrays)


def test_bad_official_config() -> None:
    with pytest.raises(ValueError, match="config lacks emb_size, ffn_size"):
        Grok.from_official({k: v for k, v in OFFICIAL.items() if k != "emb_size"}, {})


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile, bad input


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_compiles_as_one_graph(backend: str) -> None:
    grok, ids, targets = model(num_layers=1), tokens(2, 9), tokens(2, 9, seed=1)
    torch.compiler.reset()
    with grokkernels.use(backend):
        forward = torch.compile(grok, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(forward(ids), grok(ids))
        loss = torch.compile(grok.loss, fullgraph=True, backend="aot_eager")
        for compiled, eager in zip(loss(ids, targets), grok.loss(ids, targets), strict=True):
            torch.testing.assert_close(compiled, eager)
        loss(ids, targets).loss.backward()
        compiled_gradient = grok.layers[0].moe.gate_proj.grad.clone()
        grok.zero_grad()
        grok.loss(ids, targets).loss.backward()
        torch.testing.assert_close(compiled_gradient, grok.layers[0].moe.gate_proj.grad)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([[0, 61]]), r"tokens must be in \[0, 61\), got 61"),
        (torch.tensor([[-1, 3]]), r"tokens must be in \[0, 61\), got -1"),
        (torch.zeros(1, 3), "tokens must be an int32 or int64 tensor, got torch.float32"),
        (torch.zeros(3, dtype=torch.long), r"tokens must have shape \(B, T\) with T at least 1, got \(3,\)"),
        (torch.zeros(1, 0, dtype=torch.long), r"tokens must have shape"),
        (torch.zeros(1, 41, dtype=torch.long), "tokens must not exceed max_position = 40, got 41 positions"),
    ],
)
def test_bad_tokens(ids: torch.Tensor, words: str) -> None:
    grok = model()
    with pytest.raises((TypeError, ValueError), match=words):
        grok(ids)
    if "shape" not in words:
        with pytest.raises((TypeError, ValueError), match=words):
            grok.loss(ids, torch.zeros(ids.shape, dtype=torch.long))


def test_bad_targets() -> None:
    grok, ids = model(), tokens(1, 3)
    for bad, words in (
        (tokens(1, 2), r"targets must have the shape \(1, 3\) of tokens, got \(1, 2\)"),
        (torch.tensor([[1, -1, 3]]), r"targets must be in \[0, 61\) or -100, got -1"),
        (torch.zeros(1, 3), "targets must be an int32 or int64 tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            grok.loss(ids, bad)


def test_bad_model_arguments() -> None:
    with pytest.raises(TypeError, match="config must be a GrokConfig, got dict"):
        Grok(SMALL)
    with pytest.raises(TypeError, match="dtype must be one of float32, bfloat16"):
        Grok(config(), dtype=torch.int8)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().top_k = 3
