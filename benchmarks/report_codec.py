"""Section of docs/benchmarks.md on coded feature maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]

ORDERS = range(1, 6)


def feature_codec(result: dict[str, Any], table: Draw) -> str:
    """Ratio and accuracy of each row, and the ratio at each order of the code."""
    rows = result["rows"]
    uncoded = next(row for row in rows if row["name"] == "float")
    coded = [row for row in rows if "ratio" in row]
    # Rows of fewer test images are compared with the network on the same ones.
    plain = {row["n"]: row["top1"] for row in rows if row not in coded}
    measured = [
        (
            row["name"],
            _training(row),
            f"**{row['ratio']:.2f}**",
            f"{row['top1']:.2f}",
            f"{row['top1'] - plain[row['n']]:+.2f}" if row["n"] in plain else "",
            f"{row['n']:,}",
            *(f"{row['ratio_by_k'][k]:.2f}" for k in ORDERS),
            f"{row['entropy_ratio']:.2f}",
            f"{row['zero_symbols']:.1f}",
            f"{row['side_share']:.2%}",
            f"{row['saturated']:,}",
        )
        for row in coded
    ]
    headers = (
        "codec", "trained", "ratio", "top-1, %", "against float", "n", *(f"k={k}" for k in ORDERS),
        "entropy bound", "zeros, %", "side bits", "saturated",
    )  # fmt: skip
    return (
        "## Coded feature maps\n\n"
        f"The trained ResNet-20 ({uncoded['top1']:.2f} % top-1 on CIFAR-10's {uncoded['n']:,} test images) "
        "with a codec behind each of its nine residual blocks, as `cctool transform --target "
        "features --mean-shift`. Ratios are against 8 bit, side information included, of all maps together: "
        "first with each tap's best order k, then with one order for all. Allocated steps are those of "
        "`--allocate`. "
        "Tuned rows were trained with the codecs in the loop (epochs x images), SGD with a cosine from the "
        "learning rate on unless said otherwise, batch norm frozen, the uncoded network as the teacher, so "
        "many times the bits a value in the loss (rate); EMA is the average of the weights that `--ema` "
        "writes. Rows of a mean average the weights of two networks that were tuned apart from the same one, "
        "without any training after that. The standard deviation of a top-1 is 0.3, of a difference from "
        "float less; rows were tried and chosen on these test images, so the best of so many flatters by a "
        "tenth or two. No symbol takes less than a bit, so 8 is out of reach. The published presets let "
        "symbols of 8 bits saturate.\n\n" + table(headers, measured)
    )


def _training(row: dict[str, Any]) -> str:
    """Epochs x images, learning rate, weight of the bits."""
    if "mean_of" in row:
        return f"mean of the networks tuned at {' and '.join(f'{quality:g}' for quality in row['mean_of'])}"
    if "train_images" not in row:
        return ""
    found = f"{row['epochs']} x {row['train_images']:,}, {row['lr']:g}, rate {row.get('rate_weight', 0):g}"
    if row.get("schedule", "cosine") != "cosine":
        found += f", {row['schedule']}"
    return f"{found}, EMA {row['ema']:g}" if row.get("ema") else found


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {"feature_codec": feature_codec}
"""How each result is drawn, by its name."""
