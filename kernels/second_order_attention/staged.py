"""Both tangents by large products of torch's with one kernel between them.

For float32, and for heads too wide for the kernels of `fused.py` to keep in registers. A tile of
query rows is taken for a group of heads and probes: torch multiplies `Q K'`, `O_ V'` and their
tangents into float32, `softmax_tangent_kernel` makes `P`, `dS`, `P.` and `dS.` of them in the
inputs' dtype, and torch multiplies these with `K`, `V`, `Q`, `O_` and their tangents. Memory is
linear in the context: a tile's matrices take at most `WORKSPACE`.

Products of float16 and bfloat16 are summed and kept in float32 by the tensor cores; those of
float32 are as exact as `torch.backends.cuda.matmul` lets them be, by default in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from heat_fast import gpu
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.second_order_attention.primitives import softmax_weights
from heat_fast.kernels.second_order_attention.reference import Primal

#: Bytes of a tile's matrices of scores, half of which are float32.
WORKSPACE = 256 << 20
#: Rows of a tile's matrices, so that products are not thin. An eighth of the queries if that is
#: more: so much is multiplied above the diagonal in vain. More yet, up to all, while a matrix has
#: fewer scores than `FEW`: then launches take longer than what they launch.
LEAST_ROWS, FEW = 256, 1 << 22
#: Keys begin at a multiple of this, and rows are so long in memory: products, and Triton's loads of
#: several numbers, want it.
ALIGNED = 16
#: Numbers of a matrix that a program holds at a time, its warps, and registers of a thread: left
#: to itself, the assembler takes 64 and spills.
BLOCK, WARPS, REGISTERS = 1024, 8, 128


@triton.jit(
    # One compilation serves every tile: these differ from one to the next.
    do_not_specialize=("total", "probes", "count", "queries", "first", "low", "keys", "window")
)
def softmax_tangent_kernel(
    scores,
    raw,
    pulled,
    dotted,
    weights,
    moved,
    bent,
    bent_dot,
    normaliser,
    shift,
    shift_dot,
    total,
    probes,
    count,
    queries,
    first,
    low,
    keys,
    stride,
    window,
    scale,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADJOINT: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """`weights` (P) and `moved` (P.) of some probes' rows; `bent` (dS) and `bent_dot` if ADJOINT.

    From `scores` (Q K'), `raw` (Q. K' + Q K.'), `pulled` (O_ V') and `dotted` (O_. V' + O_ V.').
    What all probes share is written with the first one's. Rows are read twice, for their means and
    for the results, and up to their `stride`, a multiple of 16, so that several numbers are read at
    once. What lies beyond the last key may be anything, and is left out of the means.
    """
    # Rows lie as [head, probe, member of the group, query]; the primal has them without the probe.
    which = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = which < total
    row = which // (probes * count) * count + which % count
    position = (first + which % count % queries)[:, None]
    first_one = (which // count % probes == 0)[:, None]
    at_row = (row * stride)[:, None]
    at_probe = (which * stride)[:, None]
    lse = tl.load(normaliser + row, mask=valid, other=float("inf"))[:, None]
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for at in range(0, keys, COLUMNS):
        columns = at + tl.arange(0, COLUMNS)[None, :]
        inside = valid[:, None] & (columns < stride)
        seen = inside & (low + columns <= position)
        if WINDOWED:
            seen = seen & (low + columns > position - window)
        values = tl.load(scores + at_row + columns, mask=inside, other=0.0)
        shares, slope, _ = softmax_weights(values, lse, seen, scale, softcap, CAPPED)
        tangent = tl.load(raw + at_probe + columns, mask=inside, other=0.0)
        sums += tl.where(seen, shares * slope * tangent, 0.0)
    mean = scale * tl.sum(sums, 1)[:, None]
    if ADJOINT:
        d = tl.load(shift + row, mask=valid, other=0.0)[:, None]
        d_dot = tl.load(shift_dot + which, mask=valid, other=0.0)[:, None]
    for at in range(0, keys, COLUMNS):
        columns = at + tl.arange(0, COLUMNS)[None, :]
        inside = valid[:, None] & (columns < stride)
        once = inside & first_one
        seen = inside & (low + columns <= position)
        if WINDOWED:
            seen = seen & (low + columns > position - window)
        values = tl.load(scores + at_row + columns, mask=inside, other=0.0)
        shares, slope, bend = softmax_weights(values, lse, seen, scale, softcap, CAPPED)
        tangent = scale * tl.load(raw + at_probe + columns, mask=inside, other=0.0)
        change = shares * (tangent * slope - mean)
        tl.store(moved + at_probe + columns, change.to(moved.dtype.element_ty), mask=inside)
        tl.store(weights + at_row + columns, shares.to(weights.dtype.element_ty), mask=once)
        if ADJOINT:
            centred = tl.load(pulled + at_row + columns, mask=inside, other=0.0) - d
            plain = shares * centred
            dot = tl.load(dotted + at_probe + columns, mask=inside, other=0.0) - d_dot
            dot = change * centred + shares * dot
            if CAPPED:
                dot = dot * slope + bend * tangent * plain
                plain = plain * slope
            tl.store(bent + at_row + columns, plain.to(bent.dtype.element_ty), mask=once)
            tl.store(bent_dot + at_probe + columns, dot.to(bent_dot.dtype.element_ty), mask=inside)


def whole_rows(matrix: Tensor) -> Tensor:
    """A matrix and what lies behind its rows, up to their stride."""
    return matrix.as_strided((*matrix.shape[:-1], matrix.stride(-2)), matrix.stride())


def block(keys: int) -> tuple[int, int]:
    """Rows and columns of a program's block: whole rows, where they are short."""
    columns = min(BLOCK, max(64, triton.next_power_of_2(keys)))
    return BLOCK // columns, columns


def multiply(left: Tensor, right: Tensor, total: Tensor, *, add: bool) -> Tensor:
    """`total = left right`, or `total += left right`, into float32: `[n, m, k] [n, k, p]`."""
    if left.dtype == torch.float32:
        return total.baddbmm_(left, right, beta=int(add))
    if left.is_cuda:
        return torch.baddbmm(total, left, right, torch.float32, beta=int(add), out=total)
    # Of halves torch makes float32 on a GPU alone. Their products are exact in float32.
    return total.baddbmm_(left.float(), right.float(), beta=int(add))


def tiles(primal: Primal, batch: int) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Slices of key-value heads and probes, and of queries, whose matrices fit into `WORKSPACE`.

    Probes come first: what they share is made once for those of a tile.
    """
    heads, group, queries, _ = primal.query.shape
    # In matrices of all probes; what they share is as large as those of one more.
    most = WORKSPACE // (8 + 2 * primal.query.element_size())
    width = group * primal.key.shape[1]
    wanted = max(LEAST_ROWS // group, queries // 8, FEW // max(1, heads * batch * width))
    rows = max(1, min(queries, wanted, most // (2 * width)))
    some_probes = max(1, min(batch, most // (width * rows) - 1))
    some_heads = max(1, min(heads, most // (width * rows * (some_probes + 1))))
    # The last rows see the most keys: memory that was enough for them serves the others again.
    stretches = [slice(low, min(low + rows, queries)) for low in range(0, queries, rows)][::-1]
    for head in range(0, heads, some_heads):
        for probe in range(0, batch, some_probes):
            yield (
                slice(head, min(head + some_heads, heads)),
                slice(probe, min(probe + some_probes, batch)),
                stretches,
            )


def each(x: Tensor, probes: int) -> Tensor:
    """Rows `[H, R, D]` once for every probe, `[HP, R, D]`: one product is taken for several."""
    return x[:, None].expand(-1, probes, -1, -1).flatten(0, 1)


@dataclass(frozen=True)
class Tile:
    """Rows of the primal: `query [H, GR, D]`, and the keys and values `[H, K, D]` that they see.

    Row `g R + r` is query `first + r` of member `g` of the group; keys begin at position `low`, and
    the last of them, from column `own` on, move.
    """

    primal: Primal
    heads: slice
    queries: slice
    query: Tensor
    key: Tensor
    value: Tensor
    normaliser: Tensor
    first: int
    low: int
    own: int

    @classmethod
    def of(cls, primal: Primal, heads: slice, queries: slice) -> Tile:
        """The tile of some heads and queries."""
        first = primal.key.shape[1] - primal.query.shape[2] + queries.start
        end = first + queries.stop - queries.start
        low = primal.masking.first_key(first) // ALIGNED * ALIGNED
        return cls(
            primal,
            heads,
            queries,
            primal.query[heads, :, queries].flatten(1, 2),
            primal.key[heads, low:end],
            primal.value[heads, low:end],
            primal.normaliser[heads, :, queries].flatten(1, 2).contiguous(),
            first,
            low,
            max(0, primal.start // ALIGNED * ALIGNED - low),
        )

    def rows(self, x: Tensor) -> Tensor:
        """Of its heads' rows `[H, P, G, Q, D]` those of this tile, `[H, P, GR, D]`."""
        return x[..., self.queries, :].flatten(2, 3)

    def moving(self, x: Tensor) -> Tensor:
        """Of its heads' `aligned` rows `[H, P, S, D]` those that it sees, `[H, P, K - own, D]`."""
        begin = self.low + self.own - self.primal.start // ALIGNED * ALIGNED
        return x[:, :, begin : begin + self.key.shape[1] - self.own]

    def matrix(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """New memory for `[H, *shape, GR, K]`, its rows aligned."""
        heads, count, _ = self.query.shape
        keys = self.key.shape[1]
        stride = triton.cdiv(keys, ALIGNED) * ALIGNED
        sizes = heads, *shape, count, stride
        return torch.empty(sizes, dtype=dtype, device=self.query.device)[..., :keys]

    def product(self, fixed: Tensor, other: Tensor) -> Tensor:
        """`fixed X'`, `[H, GR, K]`."""
        return multiply(fixed, other.mT, self.matrix(), add=False)

    def products(self, moved: Tensor, fixed: Tensor, other: Tensor, other_moved: Tensor) -> Tensor:
        """`moved X' + fixed X.'`, `[H, P, GR, K]`, where X moves from column `own` on."""
        probes = moved.shape[1]
        results = self.matrix(probes)
        multiply(moved.flatten(1, 2), other.mT, results.flatten(1, 2), add=False)
        own = results.flatten(0, 1)[..., self.own :]
        multiply(each(fixed, probes), other_moved.flatten(0, 1).mT, own, add=True)
        return results

    def mix(self, moved: Tensor, fixed: Tensor, other: Tensor, other_moved: Tensor) -> Tensor:
        """`moved X + fixed X.`, `[H, P, GR, D]`."""
        heads, probes, count, _ = moved.shape
        results = torch.empty(heads, probes, count, other.shape[-1], device=moved.device)
        multiply(moved.flatten(1, 2), other, results.flatten(1, 2), add=False)
        for probe in range(probes):
            multiply(fixed[..., self.own :], other_moved[:, probe], results[:, probe], add=True)
        return results

    def gather(
        self, total: Tensor, moved: Tensor, fixed: Tensor, other: Tensor, other_moved: Tensor
    ) -> None:
        """`total += moved' X + fixed' X.`, `[H, P, K - own, D]`, of the keys that move."""
        probes = moved.shape[1]
        own = moved.flatten(0, 1)[..., self.own :]
        for probe in range(probes):
            into = total[:, probe]
            multiply(fixed[..., self.own :].mT, other_moved[:, probe], into, add=True)
        multiply(own.mT, each(other, probes), total.flatten(0, 1), add=True)

    def softmax_tangent(
        self,
        raw: Tensor,
        pulled: Tensor | None = None,
        dotted: Tensor | None = None,
        shift: Tensor | None = None,
        shift_dot: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """`P`, `P.`, and with the adjoint's products `dS`, `dS.`, in the inputs' dtype."""
        scores, dtype = self.product(self.query, self.key), self.query.dtype
        heads, probes, count, keys = raw.shape
        adjoint = pulled is not None
        results = [self.matrix(dtype=dtype), self.matrix(probes, dtype=dtype)]
        if adjoint:
            results += [self.matrix(dtype=dtype), self.matrix(probes, dtype=dtype)]
        masking = self.primal.masking
        # Where there is no adjoint its matrices are never touched.
        matrices = [
            scores,
            raw,
            scores if pulled is None else pulled,
            raw if dotted is None else dotted,
            *results,
            *([] if adjoint else results),
        ]
        rows, columns = block(keys)
        with gpu.on(raw):
            softmax_tangent_kernel[(triton.cdiv(heads * probes * count, rows),)](
                *(whole_rows(matrix) for matrix in matrices),
                self.normaliser,
                self.normaliser if shift is None else shift,
                self.normaliser if shift_dot is None else shift_dot,
                heads * probes * count,
                probes,
                count,
                self.queries.stop - self.queries.start,
                self.first,
                self.low,
                keys,
                raw.stride(-2),
                masking.window or 0,
                masking.scale,
                masking.softcap or 0.0,
                ROWS=rows,
                COLUMNS=columns,
                ADJOINT=adjoint,
                WINDOWED=masking.window is not None,
                CAPPED=masking.softcap is not None,
                num_warps=WARPS,
                maxnreg=REGISTERS,
            )
        return tuple(results)


def aligned(x: Tensor, start: int) -> Tensor:
    """Rows `[.., S, D]` of positions from `start` on, led by zeros from a multiple of `ALIGNED`."""
    lead = start % ALIGNED
    return torch.nn.functional.pad(x, (0, 0, lead, 0)) if lead else x


def attention_tangent(primal: Primal, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the reference."""
    result = torch.empty_like(query)
    key, value = aligned(key, primal.start), aligned(value, primal.start)
    for heads, probes, stretches in tiles(primal, query.shape[1]):
        for queries in stretches:
            tile = Tile.of(primal, heads, queries)
            key_dot, value_dot = (tile.moving(x[heads, probes]) for x in (key, value))
            query_dot = tile.rows(query[heads, probes])
            raw = tile.products(query_dot, tile.query, tile.key, key_dot)
            weights, moved = tile.softmax_tangent(raw)
            total = tile.mix(moved, weights, tile.value, value_dot).to(query.dtype)
            result[heads, probes, :, queries] = total.unflatten(2, (query.shape[2], -1))
            del raw, weights, moved  # before the next tile's are made
    return result


def attention_adjoint_tangent(
    primal: Primal,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    output_bar: Tensor,
    output_bar_dot: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, summed in float32; results of the given dtype."""
    results = [torch.empty_like(x, dtype=dtype) for x in (query, key, value)]
    key, value = aligned(key, primal.start), aligned(value, primal.start)
    moved = query, key, value, output, output_bar_dot
    for heads, probes, stretches in tiles(primal, query.shape[1]):
        some = [x[heads, probes] for x in moved]
        into = [x[heads, probes] for x in results]
        _adjoint_tangent(primal, heads, stretches, some, output_bar, into)
    return results[0], results[1], results[2]


def _adjoint_tangent(
    primal: Primal,
    heads: slice,
    stretches: list[slice],
    moved: list[Tensor],
    output_bar: Tensor,
    results: list[Tensor],
) -> None:
    """The same of some heads and probes, `moved [H, P, ..]` theirs, into their `results`."""
    query, key, value, output, output_bar_dot = moved
    query_result, key_result, value_result = results
    scale, group, skipped = primal.masking.scale, query.shape[2], primal.start % ALIGNED
    key_sum, value_sum = (x.new_zeros(x.shape, dtype=torch.float32) for x in (key, value))
    for queries in stretches:
        tile = Tile.of(primal, heads, queries)
        key_dot, value_dot = tile.moving(key), tile.moving(value)
        query_dot, bar_dot = tile.rows(query), tile.rows(output_bar_dot)
        bar = output_bar[heads, :, queries].flatten(1, 2)
        primal_output = primal.output[heads, :, queries].flatten(1, 2).float()
        shift = (bar * primal_output).sum(-1)
        shift_dot = (bar_dot * primal_output[:, None]).sum(-1)
        shift_dot += (bar[:, None].float() * tile.rows(output)).sum(-1)
        weights, weights_dot, bent, bent_dot = tile.softmax_tangent(
            tile.products(query_dot, tile.query, tile.key, key_dot),
            tile.product(bar, tile.value),
            tile.products(bar_dot, bar, tile.value, value_dot),
            shift,
            shift_dot,
        )
        total = scale * tile.mix(bent_dot, bent, tile.key, key_dot)
        query_result[..., queries, :] = total.unflatten(2, (group, -1)).to(query_result.dtype)
        tile.gather(tile.moving(key_sum), bent_dot, bent, tile.query, query_dot)
        tile.gather(tile.moving(value_sum), weights_dot, weights, bar, bar_dot)
        del weights, weights_dot, bent, bent_dot
    key_result.copy_(scale * key_sum[:, :, skipped:])
    value_result.copy_(value_sum[:, :, skipped:])


def variants() -> Iterator[Variant]:
    """The kernel of both halves in every dtype; an architecture changes nothing."""
    names = softmax_tangent_kernel.arg_names
    outputs = ("weights", "moved", "bent", "bent_dot")
    for dtype in ("fp32", "fp16", "bf16"):
        for adjoint in (False, True):
            for masked in (False, True):
                columns = 64 if masked else BLOCK
                label = f"{('tangent', 'adjoint')[adjoint]}, {columns} columns"
                yield Variant(
                    softmax_tangent_kernel,
                    f"{dtype} {label}{', masked' if masked else ''}",
                    {
                        **dict.fromkeys(names[: names.index("total")], "*fp32"),
                        **{name: f"*{dtype}" for name in outputs},
                        **dict.fromkeys(names[names.index("total") : names.index("scale")], "i32"),
                        "stride": "i32:16",
                        "scale": "fp32",
                        "softcap": "fp32",
                    },
                    {
                        "ROWS": BLOCK // columns,
                        "COLUMNS": columns,
                        "ADJOINT": adjoint,
                        "WINDOWED": masked,
                        "CAPPED": masked,
                    },
                    WARPS,
                    options={"maxnreg": REGISTERS},
                )
