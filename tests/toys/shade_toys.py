"""Folder sets of grey pictures, a class a shade, and commands run in this process."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from cctool.cli.main import app

SHADES = {"black": 0, "dark": 60, "grey": 120, "light": 180, "white": 250}


def picture_folder(place: Path, names: Mapping[str, int], n: int = 12) -> Path:
    """A folder set of grey pictures, a class a shade."""
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name, shade in names.items():
            folder = place / split / name
            folder.mkdir(parents=True)
            for index in range(n):
                noise = random.integers(-5, 6, (16, 16))
                Image.fromarray(np.clip(shade + noise, 0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return place


def ran(*line: object, exit_code: int = 0) -> str:
    """What a command printed, on one line."""
    result = CliRunner().invoke(app, [str(word) for word in line])
    assert result.exit_code == exit_code, result.output
    return " ".join(result.output.split())
