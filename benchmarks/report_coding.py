"""Section of docs/benchmarks.md on the entropy coder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]


def coding_speed(result: dict[str, Any], table: Draw) -> str:
    """Symbols per second of the coder, against bitarray and nncodec."""
    rows, sizes = [], []
    for row in result["rows"]:
        speed = row["million_symbols_per_second"]
        name = f"{row['values']} ({row['zeros']:.0%} zeros)"
        rows.append(
            (
                name,
                f"{speed['encode']:.0f}",
                f"**{row['ratio_python_encode']:.0f}x** ({speed['python_encode']:.1f})",
                f"{speed['table_encode']:.0f}",
                f"{speed['c_encode']:.0f}",
                f"**{row['ratio_nncodec']:.1f}x** ({speed['nncodec_encode']:.0f})",
                f"{speed['decode']:.0f}",
                f"**{row['ratio_python_decode']:.0f}x** ({speed['python_decode']:.1f})",
                f"{speed['c_decode']:.0f}",
            )
        )
        sizes.append(
            (
                name,
                row["k"],
                f"{row['bits_per_symbol']:.3f}",
                f"{row['entropy']:.3f}",
                f"{row['nncodec_bits_per_symbol']:.3f}",
            )
        )
    headers = (
        "int8 values", "encode, M/s", "Python", "Python with a table", "bitarray's C", "nncodec",
        "decode, M/s", "Python", "bitarray's C",
    )  # fmt: skip
    first = result["rows"][0]
    return (
        "## Entropy coding: symbols per second\n\n"
        f"Sparse exponential-Golomb on {first['symbols']:,} symbols of rounded Laplacians, one thread, "
        f"processor time of the best of {first['rounds']} rounds in turn. All numbers are million symbols "
        'per second, and bold how many times faster ours is. "Python" goes symbol by symbol over a bitarray, '
        "as one writes the code down from its definition. Beside it stand, as information, a loop that "
        "appends codewords from a table, and bitarray's `encode` and `decode` of a prefix code, which are C "
        "but take and give lists of Python's integers. "
        f"nncodec {first['nncodec']} (DeepCABAC, C++) is an adaptive "
        "arithmetic coder: slower, and smaller where values are sparse.\n\n"
        + table(headers, rows)
        + "\n\nBits per symbol, at the best k of 1 to 5:\n\n"
        + table(("int8 values", "k", "ours", "entropy", "nncodec"), sizes)
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {"coding_speed": coding_speed}
