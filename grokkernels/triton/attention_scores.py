"""What every kernel of flash_attention asks: which sequence a program serves, which keys a query sees, what scores are.

The G = H / Hkv query heads that share a kv head are rows of one tile, row = t * G + (head in group), so that k and v
are read once for all of them, in decoding too. Within a sequence rows, keys and positions are int32.

Tiles of packed sequences are numbered by a closed form: those of sequence b begin at offsets[b] * G / ROWS + b, which
leaves room for every sequence's last, partly filled tile. A program finds its sequence by bisection; no length is
waited for on the host. The last sequence, number `batch`, is the rows that belong to none: they see nothing and are not
seen. (The numbering and the folded heads are those of csrc/cuda/flash_attention.)
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def offset_at(offsets_ptr, b, total):
    """An entry of cu_seqlens; whatever stands there leads to no row outside the tensor."""
    return clamp(tl.load(offsets_ptr + b).to(tl.int64), 0, total)


@triton.jit
def place(number, tiles, offsets_ptr, total, batch, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Tile `number` of all sequences -> sequence, tile of the sequence. `tiles` is how many an unpacked one has."""
    if offsets_ptr is None:
        return (number // tiles).to(tl.int64), number % tiles
    else:
        low = number * 0
        high = low + batch
        while low < high:  # the last sequence whose first tile is not after `number`
            middle = (low + high + 1) // 2
            if offset_at(offsets_ptr, middle, total) * GROUP // ROWS + middle <= number:
                low = middle
            else:
                high = middle - 1
        first = (offset_at(offsets_ptr, low, total) * GROUP // ROWS).to(tl.int32) + low
        return low.to(tl.int64), number - first


@triton.jit
def stretch(b, rows, batch, offsets_ptr):
    """First row of sequence b in its tensor (0 unless packed), and how many it has, as int32."""
    first = (batch * 0).to(tl.int64)
    count = rows
    if offsets_ptr is not None:
        first = offset_at(offsets_ptr, b, rows)
        end = tl.where(b < batch, offset_at(offsets_ptr, tl.minimum(b + 1, batch), rows), rows)
        count = tl.maximum(end - first, 0)
    return first, count.to(tl.int32)


@triton.jit
def first_position(b, queries, keys, batch, q_start_ptr):
    """Position of the first query of sequence b."""
    start = keys - queries
    if q_start_ptr is not None:
        start = clamp(tl.load(q_start_ptr + b, b < batch, 0), -(1 << 29), 1 << 29).to(tl.int32)
    return start


@triton.jit
def visible(i, keys, left, right):
    """The keys [begin, end) that a query at position i sees; both ends grow with i."""
    begin = tl.where(left < 0, 0, clamp(i - left, 0, keys))
    end = tl.where(right < 0, keys, clamp(i + right + 1, 0, keys))
    return begin, end


@triton.jit
def split(begin, whole_begin, whole_end, end, STEP: tl.constexpr):
    """Where tiles of STEP from `begin` on stop being cut by the masks of the near side, and start to be by the far."""
    near = begin + tl.cdiv(tl.maximum(whole_begin - begin, 0), STEP) * STEP
    far = near + tl.maximum(tl.minimum(whole_end, end) - near, 0) // STEP * STEP
    return tl.minimum(near, end), tl.minimum(far, end)


@triton.jit
def temperature_at(i, log2_length, length):
    """The factor of scores at positions i."""
    hot = tl.log2(tl.maximum(i, 1).to(tl.float32)) / log2_length
    return tl.where(i > length, hot, 1.0)


@triton.jit
def tanh(x):
    """x + x^3 p(x^2), a fit on [0, 0.55], and 1 - 2 / (1 + e^2|x|) beyond: about one unit in the last place.

    Signs are bits here: in tiles of scores elementary.tanh takes more registers than there are.

    (A hardware tanh that errs by 2^-11 puts an error of 0.015 into a score capped at 30.)
    """
    square = x * x
    p = square * -0.006615754682570696 + 0.021312745288014412
    p = p * square - 0.053910065442323685
    p = p * square + 0.13333117961883545
    p = p * square - 0.3333333134651184
    near = x * square * p + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (1.0 + tl.exp2(size * (2.0 * LOG2_E)))
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return tl.where(size < 0.55, near, (far.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True))


@triton.jit
def raw_score(
    qk,
    position,  # of the queries
    key,  # numbers of the keys, at right angles to the positions
    temperature,  # of the queries, or None: 1
    slope,  # of ALiBi of the queries, or None: 0
    inner,  # q.k is multiplied by it first
    cap,
    CAPPED: tl.constexpr,
    GENERAL: tl.constexpr,
):
    """q.k -> what the score is but for a positive factor, known outside, and its slope divided by the scale.

    Plain scores are q.k itself; with a cap alone tanh(scale / cap * q.k); else (GENERAL) the score.
    """
    raw = qk
    derivative = 1.0
    if CAPPED or GENERAL:
        raw = qk * inner
    if CAPPED:
        raw = tanh(raw)
        derivative = 1.0 - raw * raw
        if GENERAL:
            raw *= cap
    if temperature is not None:
        raw *= temperature
        derivative *= temperature
    if slope is not None:
        raw -= slope * tl.abs((position - key).to(tl.float32))
    return raw, derivative


@triton.jit
def power(raw, top, factor, dtype: tl.constexpr):
    """exp(score - the row's maximum): one multiply-add before the exponential; in float32 the difference comes first,
    since the product would round by the size of the score."""
    if dtype == tl.float32:
        return tl.exp2((raw - top) * factor)
    else:
        return tl.exp2(raw * factor - top * factor)


@triton.jit
def limit(key, begin, end, WINDOWED: tl.constexpr):
    """+infinity where begin <= key < end, else -infinity, without a predicate: these do not fit AMD's scalar registers.
    Without a window every key is at `begin` or after it."""
    beyond = end - 1 - key
    if WINDOWED:
        beyond |= key - begin
    return ((beyond & -2147483648) | 0x7F800000).to(tl.float32, bitcast=True)
