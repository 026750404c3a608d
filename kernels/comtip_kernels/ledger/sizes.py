"""The named sizes: traffic and FLOPs of every operation, their lower bounds, and predicted times on a roofline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from comtip_kernels import tiles as table
from comtip_kernels.flops import attention_tile, image_tile, infonce_chunk, level_chunk, panel_parts
from comtip_kernels.ledger import traffic
from comtip_kernels.ledger.traffic import Traffic, fewest_loads, library_product
from comtip_kernels.rates import Rates, read_rates

ROOFS = {"a100": read_rates()["a100-80"], "h100": read_rates()["h100"]}
"""Rates of the GPUs for which times are predicted; a kernel is as slow as the slowest of compute, L2 and memory."""
BF16 = 2


@dataclass(frozen=True)
class Sized:
    """One operation at one named size."""

    op: str
    part: str
    """``forward`` or ``backward``."""
    size: str
    """Name of the size."""
    moved: Traffic
    floor_bytes: int
    """Lower bound of the bytes from and to memory."""
    floor_flops: int
    """Lower bound of the FLOPs."""
    floor_loaded: int
    """Fewest bytes that cross L2: for products, with the tile that loads least among those whose sums fit into the registers of a
    multiprocessor (:data:`comtip_kernels.ledger.traffic.REGISTER_SUMS`); otherwise every distinct byte once."""
    programs: int
    """Number of programs of the operation's kernel that has the fewest; library kernels do not count."""
    recomputed_flops: int = 0
    """Those of the lower bound that compute a product of the forward pass again, because it was not stored."""

    def row(self) -> dict[str, str]:
        """Return the row of the table; times are predicted, in microseconds."""
        out = {
            "op": self.op,
            "part": self.part,
            "size": self.size,
            "loaded_mb": f"{self.moved.loaded / 1e6:.1f}",
            "floor_loaded_mb": f"{self.floor_loaded / 1e6:.1f}",
            "loaded_ratio": f"{self.moved.loaded / self.floor_loaded:.3f}",
            "memory_mb": f"{self.moved.memory / 1e6:.1f}",
            "floor_mb": f"{self.floor_bytes / 1e6:.1f}",
            "memory_ratio": f"{self.moved.memory / self.floor_bytes:.3f}",
            "gflop": f"{self.moved.flops / 1e9:.1f}",
            "floor_gflop": f"{self.floor_flops / 1e9:.1f}",
            "recomputed_gflop": f"{self.recomputed_flops / 1e9:.1f}",
            "programs": str(self.programs),
        }
        for gpu, rates in ROOFS.items():
            seconds = self.seconds(rates)
            out |= {f"{roof}_us_{gpu}": f"{s * 1e6:.0f}" for roof, s in seconds.items()}
            bound = max(seconds, key=lambda roof: seconds[roof])
            out |= {f"predicted_us_{gpu}": f"{seconds[bound] * 1e6:.0f}", f"bound_{gpu}": bound}
        return out

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Return the predicted seconds for each of the three rates, if L2 serves every load request.

        Multiprocessors without a program in the last wave neither compute nor load. All kernels of the operation are assumed to run
        in as many waves as the kernel with the fewest programs, with one program at a time on each multiprocessor.
        """
        busy = busy_share(self.programs, rates.multiprocessors)
        return {
            "compute": self.moved.flops / rates.bf16 / busy,
            "l2": self.moved.loaded / rates.l2 / busy,
            "memory": self.moved.memory / rates.reachable_memory,
        }


def busy_share(programs: int, multiprocessors: int) -> float:
    """Return the share of multiprocessors that have a program, over all waves."""
    return programs / (ceil(programs / multiprocessors) * multiprocessors)


def _blocks(rows: int, columns: int, t: dict[str, Any], height: str = "BM", width: str = "BN") -> int:
    """Return the number of tiles of a (rows, columns) matrix."""
    return ceil(rows / t[height]) * ceil(columns / t[width])


def _with_width(config: dict[str, Any], D: int) -> dict[str, Any]:
    return config | ({"BD": min(config["BD"], D)} if "BD" in config else {})


def _fewest_logits(B: int, M: int, D: int, ids: int = 0) -> int:
    """Return the fewest bytes that the forward pass of InfoNCE loads."""
    return fewest_loads(
        lambda h, w: traffic.infonce_forward(B, M, D, BF16, {"BM": h, "BN": w, "BK": 1}, ids).loaded,
    )


def _fewest_derivatives(B: int, M: int, D: int, ids: int = 0) -> int:
    """Return the fewest bytes that load the derivatives' operands in the backward pass of InfoNCE."""
    return fewest_loads(
        lambda h, w: traffic.infonce_gradient(B, M, D, BF16, {"BM": h, "BN": w, "BK": 1}, ids).loaded,
    )


def _fewest_gradients(n: int, m: int, D: int, derivatives: int) -> int:
    """Return the fewest bytes that load ``derivatives`` of (n, m) scores and their products with both sides, of width D."""

    def side(rows: int, depth: int) -> int:
        return fewest_loads(lambda h, w: library_product(rows, D, depth, BF16, tile=(h, w)).loaded)

    return derivatives + side(n, m) + side(m, n)


def infonce(B: int, M: int, D: int, name: str) -> Iterator[Sized]:
    """Yield forward and backward pass of InfoNCE on one device."""
    forward = traffic.infonce_forward(B, M, D, BF16, table.INFONCE_FORWARD["bf16"])
    blocks = _blocks(B, M, table.INFONCE_FORWARD["bf16"])
    floor = (B + M) * D * BF16 + 8 * B
    yield Sized("infonce", "forward", name, forward, floor, 2 * B * M * D, _fewest_logits(B, M, D), blocks)
    chunk = infonce_chunk(M, BF16)
    backward = traffic.infonce_backward(B, M, D, BF16, table.INFONCE_GRADIENT["bf16"], chunk)
    # The logits again and one product per side, for which their derivatives are written once and read twice.
    floor = (B + M) * D * (BF16 + 4) + 3 * B * M * BF16
    blocks = _blocks(min(B, chunk), M, table.INFONCE_GRADIENT["bf16"])
    least = _fewest_gradients(B, M, D, _fewest_derivatives(B, M, D))
    yield Sized("infonce", "backward", name, backward, floor, 6 * B * M * D, least, blocks, 2 * B * M * D)


def infonce_block(R: int, C: int, D: int, name: str) -> Iterator[Sized]:
    """Yield forward and backward pass of one block of InfoNCE."""
    ids, stats = traffic.BLOCK_IDS, 8 * (R + C)
    vectors = (R + C) * (D * BF16 + ids)
    forward = traffic.infonce_forward(R, C, D, BF16, table.INFONCE_FORWARD["bf16"], ids, diagonal=False)
    blocks = _blocks(R, C, table.INFONCE_FORWARD["bf16"])
    least = _fewest_logits(R, C, D, ids)
    yield Sized("infonce_block", "forward", name, forward, vectors + stats // 2, 2 * R * C * D, least, blocks)
    chunk = infonce_chunk(C, BF16)
    moved = traffic.infonce_backward(R, C, D, BF16, table.INFONCE_GRADIENT["bf16"], chunk, ids)
    floor = vectors + stats + (R + C) * D * 4 + 3 * R * C * BF16
    blocks = _blocks(min(R, chunk), C, table.INFONCE_GRADIENT["bf16"])
    least = _fewest_gradients(R, C, D, _fewest_derivatives(R, C, D, ids))
    yield Sized("infonce_block", "backward", name, moved, floor, 6 * R * C * D, least, blocks, 2 * R * C * D)


def _embedding(S: int, kinds: tuple[int, int, int], D: int, name: str) -> Iterator[Sized]:
    """Yield forward and backward pass of the embedding of S tokens; ``kinds`` counts distinct gene, name and value rows."""
    U, V = sum(kinds), 4099
    tables = (V + kinds[0]) * D * BF16
    forward = traffic.sentence_rows(*kinds, D, BF16, tables) + traffic.copy_rows(S, U, D, BF16)
    yield Sized("gene_sentence_embedding", "forward", name, forward, S * (D * BF16 + 4), 0, forward.distinct, U)
    sums = traffic.sum_tokens(S, U, D, BF16)
    through = traffic.norm_grads(*kinds, D, BF16, table.NORM_ROWS, tables)
    # Added by torch: the gradients of the tables read their rows of the U and are written.
    genes, names, _ = kinds
    read, written = 4 * D * (U + genes + names + genes), 4 * D * (V + genes)
    backward = sums + through + Traffic(read, read, written)
    programs = ceil(U / table.NORM_ROWS)
    floor = S * D * BF16 + written
    yield Sized("gene_sentence_embedding", "backward", name, backward, floor, 0, backward.distinct, programs)


def packed_attention(S: int, H: int, E: int, longest: int, useful: int, name: str) -> Iterator[Sized]:
    """Yield forward and backward pass of packed attention; ``useful`` counts the pairs of tokens within sentences."""
    tile = attention_tile(longest)
    for backward, tensors, products in ((False, 4, 2), (True, 7, 5)):
        moved = traffic.attention(S, H, E, BF16, longest, tile, backward=backward)
        part = "backward" if backward else "forward"
        blocks = ceil(S / (tile - longest + 1)) * H
        floors = (tensors * S * H * E * BF16, products * 2 * useful * H * E)
        again = 2 * useful * H * E if backward else 0
        yield Sized("packed_attention", part, name, moved, *floors, moved.distinct, blocks, again)


def one_query_attention(N: int, S: int, H: int, D: int, longest: int, name: str) -> Iterator[Sized]:
    """Yield forward and backward pass of attention with one query per head for each of N sentences of S tokens in all."""
    t = table.one_query_tiles("bf16", H, D, longest)
    u, vectors = 2 * S * H * D, N * H
    for backward, rows, products in ((False, S + 2 * vectors, 2), (True, 2 * S + 3 * vectors, 5)):
        moved = traffic.one_query_attention(N, S, H, D, BF16, t, backward=backward)
        part, again = ("backward", u) if backward else ("forward", 0)
        yield Sized("one_query_attention", part, name, moved, rows * D * BF16, products * u, moved.distinct, N, again)


def image_attention(B: int, tokens: tuple[int, ...], H: int, E: int, name: str) -> Iterator[Sized]:
    """Yield forward and backward pass of attention with a bias within B images in parts of ``tokens`` tokens."""
    pairs, rows = B * sum(T * T for T in tokens), B * sum(tokens)
    for backward, tensors, products in ((False, 4, 2), (True, 7, 5)):
        moved = Traffic(0, 0, 0)
        for T in tokens:
            moved += traffic.image_attention(B, T, H, E, BF16, image_tile(T), backward=backward)
        if backward:
            moved += _sum_of_parts(B * len(tokens), 3 * H * E)
        part, u = ("backward" if backward else "forward"), 2 * pairs * H * E
        floors = (tensors * rows * H * E * BF16, products * u)
        yield Sized("image_attention", part, name, moved, *floors, moved.distinct, B * H, u if backward else 0)


def residual_norm(N: int, d: int, name: str) -> Iterator[Sized]:
    """Yield forward and backward pass of residual sum and LayerNorm: an fp32 stream, a bf16 branch."""
    forward = traffic.residual_norm(N, d, 4, BF16, table.norm_tiles(d))
    programs, parts = ceil(N / table.norm_tiles(d)["R"]), ceil(N / table.POINTWISE_ROWS)
    yield Sized("residual_norm", "forward", name, forward, 2 * N * d * (4 + BF16), 0, forward.distinct, programs)
    backward = traffic.residual_norm_grads(N, d, 4, BF16, table.POINTWISE_ROWS) + _sum_of_parts(parts, 3 * d)
    floor = N * d * (2 * 4 + BF16 + 4 + BF16)
    yield Sized("residual_norm", "backward", name, backward, floor, 0, backward.distinct, parts)


def bias_gelu(N: int, d: int, name: str) -> Iterator[Sized]:
    """Yield forward and backward pass of bias and GELU in bf16."""
    forward = traffic.bias_gelu(N, d, BF16, table.GELU)
    programs, parts = (ceil(N / rows) * ceil(d / table.GELU["BD"]) for rows in (table.GELU["R"], table.POINTWISE_ROWS))
    yield Sized("bias_gelu", "forward", name, forward, 2 * N * d * BF16, 0, forward.distinct, programs)
    sums = _sum_of_parts(ceil(N / table.POINTWISE_ROWS), d)
    backward = traffic.bias_gelu_grads(N, d, BF16, table.POINTWISE_ROWS) + sums
    yield Sized("bias_gelu", "backward", name, backward, 3 * N * d * BF16, 0, backward.distinct, parts)


def _sum_of_parts(parts: int, numbers: int) -> Traffic:
    """Return the traffic of torch's sum over programs of ``numbers`` fp32 numbers each."""
    return Traffic(4 * parts * numbers, 4 * parts * numbers, 4 * numbers)


def sentence_table(B: int, G: int, Q: int, D: int, name: str) -> Iterator[Sized]:
    """Yield forward and backward pass of pooling, pair scores and L_level."""

    def tiles(config: dict[str, Any]) -> dict[str, Any]:
        QP = 1 << (Q - 1).bit_length()
        return _with_width(config, D) | {"QP": QP, "NG": max(1, config["BN"] // QP)}

    vectors, rows, each = B * D, G * Q * D, B * G
    selected = 2 * B * G * D
    pick, pool, transpose = (
        tiles(c["bf16"]) for c in (table.SAMPLED_DOT, table.WEIGHTED_SUM, table.WEIGHTED_SUM_TRANSPOSE)
    )
    level, gradient = tiles(table.LEVEL_LOSS["bf16"]), tiles(table.LEVEL_GRADIENT["bf16"])
    blocks = _blocks(B, D, pool, width="BD")
    parts, _ = panel_parts(blocks, G, pool["NG"])
    sampled = traffic.sampled_dot(B, G, Q, D, BF16, pick)
    summed = traffic.weighted_sum(B, G, Q, D, BF16, pool, parts)
    if parts > 1:  # torch adds the sums of the parts
        summed += _sum_of_parts(parts, vectors)
    transposed = traffic.weighted_sum_transpose(B, G, Q, D, BF16, transpose)
    loss = traffic.sampled_dot(B, G, Q, D, BF16, level, loss=True)
    dloss = traffic.level_backward(B, G, Q, D, BF16, gradient, level_chunk(B, Q, BF16))
    of_pick, of_pool = _blocks(B, G, pick, width="NG"), blocks * parts
    of_transpose = _blocks(G, D, transpose, "NG", "BD")
    # Lower bounds: every operand and every result once; for pooling and pairs only the products that a level selects.
    inputs, least = (vectors + rows) * BF16, _fewest_of_table(B, G, Q, D)
    floor, fewest = rows * BF16 + 5 * each + 4 * vectors, min(of_pick, of_transpose)
    yield Sized("table_pool", "forward", name, summed, floor, selected, least["sum"], of_pool)
    floor, loads = inputs + 9 * each + 4 * rows, least["pick"] + least["transpose"]
    yield Sized("table_pool", "backward", name, sampled + transposed, floor, 2 * selected, loads, fewest)
    yield Sized("pair_scores", "forward", name, sampled, inputs + 5 * each, selected, least["pick"], of_pick)
    floor, loads = inputs + 5 * each + 4 * (vectors + rows), least["sum"] + least["transpose"]
    fewest = min(of_pool, of_transpose)
    yield Sized("pair_scores", "backward", name, summed + transposed, floor, 2 * selected, loads, fewest)
    of_level, floor, flops = _blocks(B, G, level, width="NG"), inputs + 2 * each, selected * Q
    yield Sized("level_cross_entropy", "forward", name, loss, floor, flops, least["loss"], of_level)
    # The scores again and one product per side, for which their derivatives are written once and read twice.
    floor = inputs + 2 * each + 4 * (vectors + rows) + 3 * each * Q * BF16
    of_level = _blocks(B, min(G, level_chunk(B, Q, BF16)), gradient, width="NG")
    loads = _fewest_gradients(B, G * Q, D, least["derivatives"])
    yield Sized("level_cross_entropy", "backward", name, dloss, floor, 3 * flops, loads, of_level, flops)


def _fewest_of_table(B: int, G: int, Q: int, D: int) -> dict[str, int]:
    """Return {kernel over the sentence table: fewest bytes that it loads}."""
    QP = 1 << (Q - 1).bit_length()

    def sampled(h: int, w: int, *, loss: bool = False) -> int:
        return traffic.sampled_dot(B, G, Q, D, BF16, {"BM": h, "NG": w, "QP": QP, "BK": 1}, loss=loss).loaded

    def derivatives(h: int, w: int) -> int:
        return traffic.level_gradient(B, G, Q, D, BF16, {"BM": h, "NG": w, "QP": QP, "BK": 1}).loaded

    def summed(h: int, w: int) -> int:
        return traffic.weighted_sum(B, G, Q, D, BF16, {"BM": h, "NG": 1, "QP": QP, "BD": w}).loaded

    def transposed(h: int, w: int) -> int:
        return traffic.weighted_sum_transpose(B, G, Q, D, BF16, {"BM": 1, "NG": h, "QP": QP, "BD": w}).loaded

    return {
        "pick": fewest_loads(sampled, QP),
        "loss": fewest_loads(lambda h, w: sampled(h, w, loss=True), QP),
        "derivatives": fewest_loads(derivatives, QP),
        "sum": fewest_loads(summed),
        "transpose": fewest_loads(transposed, QP),
    }


def sizes() -> list[Sized]:
    """Return every operation at its named sizes, bf16.

    The panel is 2,048 genes drawn from the shipped gene table with symbol and name, at most 18 tokens, at 32 levels: S = 851,552
    tokens, of which 2,048 + 4,355 + 480 are distinct. The attention has 255,990 sentences: 18,285 of each length from 3 to 16.
    """
    out = [
        *infonce(32768, 32768, 512, "B = M = 32k, D = 512"),
        *infonce(8192, 16384, 512, "B = 8k, M = 16k, D = 512"),
        *infonce(1024, 2048, 512, "B = 1k, M = 2k, D = 512"),
        # One of 64 ranks with 1,024 images and 1,024 mispaired texts each, all images gathered.
        *infonce_block(65536, 2048, 512, "R = 64k, C = 2k, D = 512"),
    ]
    out += _embedding(851_552, (2048, 4355, 480), 512, "2,048 genes x 32 levels, D = 512")
    n = 256_000 // 14
    lengths = range(3, 17)
    out += packed_attention(
        n * sum(lengths), 8, 64, 16, n * sum(x * x for x in lengths), "256k sentences of 3 to 16, 8 heads x 64"
    )
    out += one_query_attention(65_536, 851_552, 8, 512, 18, "2,048 genes x 32 levels, 8 heads, D = 512")
    # Blocks in a step of configs/1gpu.yaml: all 49 patches of 1,024 tiles and the 25 visible ones, each with a class token, in
    # ViT-B/32; and the tokens of its panel.
    out += image_attention(1024, (50, 26), 12, 64, "1,024 images of 50 and 26 tokens, 12 heads x 64")
    for N, d in ((77_824, 768), (403_456, 512)):
        out += residual_norm(N, d, f"{N:,} rows, d = {d}")
        out += bias_gelu(N, 4 * d, f"{N:,} rows, d = {4 * d:,}")
    out += sentence_table(4096, 2048, 32, 512, "B = 4k, G = 2k, Q = 32, D = 512")
    out += sentence_table(1024, 2048, 32, 512, "B = 1k, G = 2k, Q = 32, D = 512")
    return out
