"""Compressed texts: what is written is read, and nothing else, whatever it claims."""

import random
import struct
import zlib

import pytest
import torch
from torch import Tensor

from cctool.base.errors import CheckpointError, CorruptCheckpointError
from cctool.checkpoint.file import compact as module
from cctool.checkpoint.file.compact import compressed, inflated

TEXTS = ["", "x", "{}", "é\u2028🙂", "abc" * 5000, "".join(map(chr, range(300)))]


def stored(length: int, stream: bytes) -> Tensor:
    return torch.tensor(list(struct.pack("<I", length) + stream), dtype=torch.uint8)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_survives_and_is_a_declared_zlib_stream(text: str) -> None:
    found = compressed(text)
    data = found.numpy().tobytes()
    assert zlib.decompress(data[4:]) == text.encode()
    assert struct.unpack("<I", data[:4]) == (len(text.encode()),)
    assert inflated(found) == text
    assert torch.equal(compressed(text), found)


def test_repeated_text_gets_small() -> None:
    assert compressed("layer1.0.weight " * 1000).numel() < 200


@pytest.mark.parametrize("length", [0, 1, 9, 11, 2**20])
def test_another_length_than_the_declared_is_refused(length: int) -> None:
    with pytest.raises(CorruptCheckpointError, match="another length"):
        inflated(stored(length, zlib.compress(b"0123456789")))


def test_a_stream_that_goes_on_or_ends_early_is_refused() -> None:
    stream = zlib.compress(b"0123456789")
    with pytest.raises(CorruptCheckpointError, match="another length"):
        inflated(stored(10, stream + b"x"))
    for end in range(len(stream)):
        with pytest.raises(CorruptCheckpointError):
            inflated(stored(10, stream[:end]))
    for end in range(4):
        with pytest.raises(CorruptCheckpointError, match="cut off"):
            inflated(stored(10, stream)[:end])


def test_claims_above_the_limits_are_refused_before_anything_is_inflated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bomb = zlib.compress(bytes(3 * 2**20), 9)
    monkeypatch.setattr(module.zlib, "decompressobj", lambda: pytest.fail("inflated"))
    for length in (3 * 2**20, 2**32 - 1):
        with pytest.raises(CorruptCheckpointError, match="more than is allowed"):
            inflated(stored(length, bomb))


def test_a_bomb_that_declares_little_is_inflated_no_further() -> None:
    inflater = zlib.decompressobj()
    bomb = zlib.compress(bytes(50 * 2**20), 9)
    assert len(inflater.decompress(bomb, 11)) == 11
    with pytest.raises(CorruptCheckpointError, match="another length"):
        inflated(stored(10, bomb))


def test_what_compresses_better_than_may_be_read_is_written_less_compressed() -> None:
    text = "a" * (2**20 + 1)
    found = compressed(text)
    assert found.numel() > len(text)
    assert inflated(found) == text


def test_too_long_a_text_is_refused_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_TEXT", 10)
    compressed("0123456789")
    with pytest.raises(CheckpointError, match="11 bytes"):
        compressed("0123456789x")


@pytest.mark.parametrize(
    "value", [None, "text", b"bytes", torch.zeros(9), torch.zeros(3, 3).byte(), torch.zeros(9).char()]
)
def test_what_is_no_row_of_bytes_is_refused(value: object) -> None:
    with pytest.raises(CorruptCheckpointError, match="row of bytes"):
        inflated(value)


def test_texts_that_are_not_utf8_are_refused() -> None:
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        inflated(stored(2, zlib.compress(b"\xff\xfe")))


def test_changed_bits_are_seen_or_change_nothing() -> None:
    # How a stream was compressed, and bits that fill a byte up, say nothing of the text.
    text = "spec, history and index"
    whole, source = compressed(text), random.Random(0)
    seen = 0
    for _ in range(200):
        changed = whole.clone()
        changed[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        try:
            assert inflated(changed) == text
        except CorruptCheckpointError:
            seen += 1
    assert seen > 180
