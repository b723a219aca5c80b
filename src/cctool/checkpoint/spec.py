"""What a checkpoint says about its model: how to build it again, and what was done to it.

Everything here is data, validated by pydantic before anything is allocated: no code, no pickles.
Which architectures, edits and encodings exist is not known here; `tables.py` passes them in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_serializer,
    model_validator,
)

MAX_DIMENSION = 2**31 - 1
"""Largest size of one dimension that a spec may name."""

MAX_EDITS = 100_000
"""Largest number of edits that a spec may hold."""

Dimension = Annotated[int, Field(ge=1, le=MAX_DIMENSION, strict=True)]
Shape = tuple[Annotated[int, Field(ge=0, le=MAX_DIMENSION, strict=True)], ...]


class Record(BaseModel):
    """Base of all stored records: immutable, and unknown keys are refused."""

    # "constants" keeps infinities as they are, for the writer to refuse; pydantic would make null of them.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Preprocessing(Record):
    """How an image becomes an input: scaled to 0..1, then (x - mean) / std per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _usable(self) -> Preprocessing:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError("mean and std need one value per channel")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError("mean must be finite and std positive")
        return self


class Edit(Record):
    """One declarative change of structure; the kinds are subclasses, listed in `Tables.edits`.

    An edit describes the final state of one module, so applying it twice changes nothing more, and a
    later edit of the same kind to the same module replaces it.
    """

    kind: str
    module: str


class ModelSpec(Record):
    """How to build the module again, what its inputs are, and what it was made for.

    Attributes:
        architecture: name in the table of architectures, or the user's ``file.py:factory``.
        arguments: keyword arguments of the builder.
        input_shape: (channels, height, width) of one input.
        task: name of what the outputs mean; which names exist is not known here.
        task_settings: of the task, such as the references of the user's loss and metric.
        classes: names of the classes, in the order of the logits.
        preprocessing: normalisation that the inputs need; None if unknown.
        data: reference of the last data set, never the data themselves.
        edits: changes of structure, applied in order after building.
    """

    architecture: str = Field(min_length=1, max_length=4096)
    arguments: dict[str, JsonValue] = {}
    input_shape: tuple[Dimension, Dimension, Dimension]
    task: str = Field(default="classification", min_length=1, max_length=100)
    task_settings: dict[str, JsonValue] = Field(default={}, max_length=100)
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    data: str | None = None
    edits: tuple[dict[str, JsonValue], ...] = Field(default=(), max_length=MAX_EDITS)

    @field_validator("arguments", "task_settings", "edits")
    @classmethod
    def _json(cls, value: Any) -> Any:
        # Pydantic takes NaN and 1e999 for JSON values, and would write them as null.
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError("JSON has no NaN and no infinity") from None
        return value

    @model_serializer(mode="wrap")
    def _without_empty_settings(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # Specs without settings are written as they always were, so that their content hashes stay.
        return {name: value for name, value in handler(self).items() if name != "task_settings" or value}

    def with_edits(self, edits: tuple[Edit, ...]) -> ModelSpec:
        """Return this spec with ``edits`` merged in; they replace earlier ones of their kind and module."""
        merged: dict[tuple[str, str], dict[str, Any]] = {
            (str(edit["kind"]), str(edit["module"])): dict(edit) for edit in self.edits
        }
        for edit in edits:
            merged[edit.kind, edit.module] = edit.model_dump(mode="json")
        return self.model_copy(update={"edits": tuple(merged.values())})


class Metrics(Record):
    """What an evaluation measured on n samples, by name: ``loss``, a mean, and the metrics of the task."""

    split: str
    n: int = Field(ge=0)
    values: dict[str, float]

    @field_validator("values", mode="before")
    @classmethod
    def _finite(cls, values: Any) -> Any:
        # JSON has no NaN: a value that is not finite is left out.
        if isinstance(values, dict):
            return {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        return values


class Size(Record):
    """What a model costs: scalar parameters, multiply-accumulates of one input, bytes of stored tensors."""

    parameters: int
    macs: int | None = None
    bytes: int | None = None


class Parent(Record):
    """A file that went into a step.

    Attributes:
        path: file name, without its folder.
        content: SHA-256 over spec, history and tensors; equal for ``.pt`` and ``.safetensors``.
        file: SHA-256 of the file's bytes, as ``sha256sum`` prints it.
    """

    path: str
    content: str | None
    file: str


class Signal(Record):
    """What a quantization left of the outputs' signal, measured against the network that came in.

    Attributes:
        split: part of the data set.
        n: number of images.
        snr_db: signal-to-noise ratio in dB: 10 log10 of the variance of the outputs before (over images, the
            mean of each element removed) over the mean squared difference, all elements of all
            floating-point outputs pooled; None if nothing differs, or the outputs did not vary.
        snr_db_with_mean: the same without removing the mean.
        nonfinite: output elements that were finite before and are NaN or infinite now.
        agreement: percent of the task's decisions that are the same; None for a task without decisions.
        commonest: percent of the decisions before that are the commonest one.
        agreement_of: what the decision is, such as ``top-1``.
        lost: outputs of which most of the signal is gone.
        lost_db: signal-to-noise ratio of each of these alone; None without signal.
        uncompared: outputs that have no fixed shape for each image.
    """

    split: str
    n: int = Field(ge=0)
    snr_db: float | None
    snr_db_with_mean: float | None
    nonfinite: int = 0
    agreement: float | None = None
    commonest: float | None = None
    agreement_of: str | None = None
    lost: tuple[str, ...] = ()
    lost_db: dict[str, float | None] = {}
    uncompared: tuple[str, ...] = ()


class Step(Record):
    """One line of history: a command, what it read, and what it measured.

    Attributes:
        verb: the command's name.
        options: its options, defaults included.
        seed: of the pseudo-random generators.
        parent: the checkpoint that was read; None for a fresh network.
        others: further files that were read (a teacher), by role.
        versions: of cctool and torch.
        before: size of the network that came in; None for a fresh network.
        after: size of the network that went out.
        metrics_before: measured on the network that came in.
        metrics_after: measured on the network that went out.
        notes: what the command did not do, and why.
        signal: of a quantization with images.
    """

    verb: str
    options: dict[str, JsonValue]
    seed: int
    parent: Parent | None = None
    others: dict[str, Parent] = {}
    versions: dict[str, str] = {}
    before: Size | None = None
    after: Size | None = None
    metrics_before: tuple[Metrics, ...] = ()
    metrics_after: tuple[Metrics, ...] = ()
    notes: tuple[str, ...] = ()
    signal: Signal | None = None

    @model_serializer(mode="wrap")
    def _without_missing_signal(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # Other steps are written as they always were.
        return {name: value for name, value in handler(self).items() if name != "signal" or value is not None}


class History(Record):
    """All steps that led to a checkpoint, oldest first."""

    steps: tuple[Step, ...] = ()
