"""The compact form: its parts contradict each other, share bytes, or are as small as they can be."""

import contextlib
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cctool.base.errors import CctoolError, CheckpointError, CorruptCheckpointError
from cctool.checkpoint.checkpoint import Checkpoint, load, open_file, save
from cctool.checkpoint.file import torch_file
from cctool.checkpoint.file.compact import compressed, inflated
from cctool.checkpoint.file.payload import canonical_json
from cctool.quantization.encodings.intn import encode_integers
from checkpoint_toys import TABLES, assert_same_tensors, make, masked, quantized

SUFFIXES = (".pt", ".safetensors")
Document = dict[str, Any]


def toy() -> Checkpoint:
    """With large and small dense tensors, and encoded ones."""
    checkpoint = quantized(make(), "affine-u8", axis=0)
    checkpoint.model.register_buffer("large", torch.arange(2000.0))
    return checkpoint


def text_of(document: Document) -> Document:
    found: Document = json.loads(inflated(document["text"]))
    return found


def written(folder: Path, document: Document) -> Path:
    path = folder / "changed.pt"
    with path.open("wb+") as stream:
        torch.save(document, stream)
        torch_file._append_checksum(stream)
    return path


def opened(folder: Path, change: Callable[[Document, Document], None]) -> None:
    """Open a file whose document and text were changed by someone who then made its checksum right."""
    save(toy(), folder / "good.pt", TABLES, overwrite=True)
    document = torch.load(folder / "good.pt", weights_only=True)
    text = text_of(document)
    kept = document["text"]
    change(document, text)
    if document["text"] is kept:
        document["text"] = compressed(json.dumps(text))
    open_file(written(folder, document))


def entry(text: Document, name: str) -> Any:
    return dict(text["index"])[name]


def set_entry(name: str, value: Any) -> Callable[[Document, Document], None]:
    def change(document: Document, text: Document) -> None:
        next(line for line in text["index"] if line[0] == name)[1] = value

    return change


def field(name: str, *keys: str, value: Any) -> Callable[[Document, Document], None]:
    def change(document: Document, text: Document) -> None:
        found = entry(text, name)
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return change


def put(key: str, value: Any) -> Callable[[Document, Document], None]:
    return lambda document, text: document.__setitem__(key, value)


def put_text(key: str, value: Any) -> Callable[[Document, Document], None]:
    return lambda document, text: text.__setitem__(key, value)


def repeated(document: Document, text: Document) -> None:
    text["index"] += text["index"][:1]


def multiplied(document: Document, text: Document) -> None:
    place = entry(text, "bn.weight")
    text["index"] += [[f"copy{index}", place] for index in range(100)]


DEEP = "[" * 100_000 + "]" * 100_000
CHANGES = {
    "no text": (put("text", None), "row of bytes"),
    "a text that is text": (put("text", "{}"), "row of bytes"),
    "a text that is no stream": (put("text", torch.zeros(99).byte()), "damaged"),
    "a text that is no JSON": (put("text", compressed("{")), "malformed"),
    "a text that is a list": (put("text", compressed("[]")), "malformed"),
    "a deep text": (put("text", compressed(DEEP)), "malformed"),
    "no arena": (put("arena", None), "row of bytes"),
    "an arena of floats": (put("arena", torch.zeros(9999)), "row of bytes"),
    "a short arena": (put("arena", torch.zeros(3).byte()), "outside the arena"),
    "a changed arena": (put("arena", torch.zeros(9999).byte()), "do not match their digest"),
    "no digest": (put("digest", None), "digest is missing"),
    "another digest": (put("digest", "0" * 64), "do not match their digest"),
    "a later format": (put("cctool", 3), "format 3"),
    "the other format": (put("cctool", 1), "spec is missing"),
    "no model": (put("model", None), "not a state dict"),
    "an unnamed tensor": (put("model", {"large": torch.arange(2000.0), "x": torch.ones(2)}), "not name x"),
    "a lacking tensor": (put("model", {}), "large, which is not in the file"),
    "a changed tensor": (put("model", {"large": torch.zeros(2000)}), "do not match their digest"),
    "no spec": (lambda document, text: text.pop("spec"), "malformed"),
    "a spec that is text": (put_text("spec", "{}"), "spec is malformed"),
    "a spec with NaN": (lambda d, t: t["spec"]["arguments"].update(x=float("nan")), "JSON"),
    "no history": (lambda document, text: text.pop("history"), "malformed"),
    "another history": (put_text("history", {"surprise": 1}), "history is malformed"),
    "no index": (put_text("index", None), "malformed"),
    "an index that is a table": (put_text("index", {}), "malformed"),
    "a line of one": (put_text("index", [["fc.weight"]]), "malformed"),
    "a name twice": (repeated, "names large twice"),
    "a tensor many times": (multiplied, "more tensors lie in the arena"),
    "a tie to nothing": (set_entry("fc.bias", "nothing"), "nothing, which is not in the file"),
    "a tie to itself": (set_entry("fc.bias", "fc.bias"), "fc.bias, which is not in the file"),
    "a tie to a later one": (set_entry("bn.weight", "fc.bias"), "fc.bias, which is not in the file"),
    "a wrong tie": (set_entry("bn.bias", "bn.weight"), "do not match their digest"),
    "an entry that is a number": (set_entry("fc.bias", 3), "malformed"),
    "an entry with a surprise": (field("fc.bias", "surprise", value=1), "malformed"),
    "an unknown type": (field("fc.bias", "dtype", value="float8"), "unknown element type"),
    "an unknown decoded type": (field("fc.weight", "dtype", value="x"), "unknown element type"),
    "a negative offset": (field("fc.bias", "offset", value=-1), "malformed"),
    "a broken offset": (field("fc.bias", "offset", value=1), "outside the arena"),
    "an offset that is no number": (field("fc.bias", "offset", value=True), "malformed"),
    "a large offset": (field("fc.bias", "offset", value=2**62), "outside the arena"),
    "a large shape": (field("fc.bias", "shape", value=[2**31 - 1] * 8), "outside the arena"),
    "an impossible shape": (field("fc.bias", "shape", value=[0, *[2**31 - 1] * 8]), "impossible|malformed"),
    "a part outside": (field("fc.weight", "parts", "low", "offset", value=2**40), "outside the arena"),
    "a part of no type": (field("fc.weight", "parts", "low", "dtype", value="object"), "unknown element"),
    "another part": (field("fc.weight", "parts", "low", "offset", value=0), "do not match their digest"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_parts_that_are_not_what_they_should_be(name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    opened(tmp_path, lambda document, text: None)
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, change)


def test_mutated_texts_raise_only_our_errors(tmp_path: Path) -> None:
    save(toy(), tmp_path / "good.pt", TABLES)
    document = torch.load(tmp_path / "good.pt", weights_only=True)
    data = inflated(document["text"]).encode()
    source = random.Random(2)
    for _ in range(150):
        mutated = bytearray(data)
        for _ in range(source.randrange(1, 4)):
            start = source.randrange(len(mutated))
            mutated[start : start + source.randrange(3)] = source.choice(
                [b"0", b"9", b'"', b"[", b"null", b"-"]
            )
        stream = zlib.compress(mutated)
        length = len(mutated).to_bytes(4, "little")
        document["text"] = torch.frombuffer(bytearray(length + stream), dtype=torch.uint8)
        with contextlib.suppress(CctoolError):
            load(written(tmp_path, document), TABLES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_tensors_stay_apart_and_tied_ones_tied(suffix: str, tmp_path: Path) -> None:
    checkpoint = quantized(make(), "fp16")
    model = checkpoint.model
    for name in ("a", "b"):
        model.register_buffer(name, torch.ones(7))
        model.register_buffer(f"large_{name}", torch.ones(3000))
    model.register_buffer("again", model.a)
    model.register_buffer("large_again", model.large_a)
    path = tmp_path / f"a{suffix}"
    save(checkpoint, path, TABLES)
    payload = open_file(path).payload
    assert payload is not None
    found = payload.tensors
    assert found["again"] is found["a"]
    assert found["large_again"] is found["large_a"]
    storages = {name: value.untyped_storage().data_ptr() for name, value in found.items() if name in "ab"}
    assert len(set(storages.values())) == 2
    found["a"].zero_()
    assert torch.equal(found["b"], torch.ones(7))
    # A second large tensor costs its bytes, a second name of it a line.
    assert 24_000 < path.stat().st_size < 28_000


def test_a_tensor_with_the_bytes_of_a_part_lies_in_its_place(tmp_path: Path) -> None:
    checkpoint = make(width=64)
    weight = checkpoint.model.depthwise.weight
    scale = torch.linspace(0.1, 0.2, 64)
    form = encode_integers(torch.randint(-8, 8, weight.shape), scale, bits=4, axis=0)
    weight.data.copy_(TABLES.encodings["intn"].decode(form))
    checkpoint = replace(checkpoint, stored={"depthwise.weight": form})
    for index in range(3):
        checkpoint.model.register_buffer(f"scale{index}", scale.clone())
    checkpoint.model.register_buffer("bits", scale.view(torch.int32).clone())
    save(checkpoint, tmp_path / "a.pt", TABLES)
    document = torch.load(tmp_path / "a.pt", weights_only=True)
    text = text_of(document)
    places = [entry(text, f"scale{index}")["offset"] for index in range(3)]
    assert places[0] == entry(text, "depthwise.weight")["parts"]["scale"]["offset"]
    # Only one: what a file's tensors are copied to is bounded by what it holds.
    assert len({*places, entry(text, "bits")["offset"]}) == 4
    state = checkpoint.model.state_dict()
    payload = open_file(tmp_path / "a.pt").payload
    assert payload is not None
    for name in ("scale0", "scale1", "bits"):
        assert torch.equal(payload.tensors[name], state[name])
        assert payload.tensors[name].dtype == state[name].dtype


def test_masks_and_weights_share_their_bits(tmp_path: Path) -> None:
    checkpoint = masked(make(width=8), {"fc.weight": torch.rand(3, 8) < 0.5})
    save(checkpoint, tmp_path / "a.pt", TABLES)
    stored = load(tmp_path / "a.pt", TABLES).stored
    assert stored["fc.weight"].parts["bits"] is stored["fc.weight_mask"].parts["bits"]


def test_both_containers_hold_the_same(tmp_path: Path) -> None:
    checkpoint = toy()
    for suffix in SUFFIXES:
        save(checkpoint, tmp_path / f"a{suffix}", TABLES)
    first, second = (open_file(tmp_path / f"a{suffix}") for suffix in SUFFIXES)
    assert first.origin.content == second.origin.content
    assert first.payload is not None
    assert second.payload is not None
    assert list(first.payload.tensors) == list(second.payload.tensors) == list(checkpoint.model.state_dict())
    assert first.payload.spec == second.payload.spec == checkpoint.spec


def test_files_of_the_first_format_are_read_as_what_is_written_now(tmp_path: Path) -> None:
    save(quantized(make(), "affine-u8", axis=0), tmp_path / "new.pt", TABLES)
    new = load(tmp_path / "new.pt", TABLES)
    document = torch.load(tmp_path / "new.pt", weights_only=True)
    text = text_of(document)
    encoded = {name: line for name, line in text["index"] if "encoding" in line}
    payload = new.payload()
    old = written(
        tmp_path,
        {
            "cctool": 1,
            "spec": canonical_json(text["spec"]),
            "history": canonical_json(text["history"]),
            "digests": canonical_json(dict(payload.digests)),
            "model": {k: v for k, v in payload.tensors.items() if k not in encoded},
            "encoded": {
                "index": canonical_json(encoded),
                "order": canonical_json(list(payload.tensors)),
                "arena": document["arena"],
            },
        },
    )
    first = load(old, TABLES)
    assert first.origin is not None
    assert new.origin is not None
    assert first.origin.content == new.origin.content
    assert_same_tensors(first.model, new.model)
    save(first, tmp_path / "again.pt", TABLES)
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "new.pt").read_bytes()


def test_many_equal_names_are_refused_before_they_are_copied(tmp_path: Path) -> None:
    save(toy(), tmp_path / "good.pt", TABLES)
    document = torch.load(tmp_path / "good.pt", weights_only=True)
    text = text_of(document)
    whole = {"dtype": "uint8", "shape": [document["arena"].numel()], "offset": 0}
    text["index"] = [[f"t{index}", whole] for index in range(3)]
    document["text"], document["model"] = compressed(json.dumps(text)), {}
    with pytest.raises(CorruptCheckpointError, match="t1: more tensors"):
        open_file(written(tmp_path, document))
