"""What `parity.py` compares of two runs of the same commands, and what it leaves out.

Compared: exit status; which files were written; stdout, line by line, JSON documents to the byte; all
numbers on stderr in their order, while its words may change; and the files by their kind. Checkpoints have to
be equal to the byte. Where they are not, a reader of its own (JSON and `torch.load(weights_only=True)`, no
cctool) names what differs: spec, history, tensors, stored tensors with their parts, state for resuming.

Left out, because it is measured time or tells of the machine: the keys of `MEASURED` in JSON, the columns of
`MEASURED_COLUMNS` in metrics.csv, what `TIMES` matches on stderr and in logs, the dates in workbooks, the
files of `IGNORED`, and of programs exported by torch the lines of source and the random number that it writes
(`RANDOM_ENTRY`, `TRACES`), with the file's size, which the paths in it change.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shlex
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

__all__ = ["Comparison"]

MEASURED = frozenset({"milliseconds", "fastest", "runs", "seconds", "batch_ms"})
"""Keys of JSON documents whose values are measured times, or how often was measured."""

MEASURED_COLUMNS = frozenset({"batch_ms", "seconds"})
"""Columns of metrics.csv, and tags of TensorBoard, of measured times."""

IGNORED = ("environment.json", "job.json", "worker-*.log")
"""Files that tell where and by which processes a command ran."""

TIMES = (
    r"latency, ms[^\n]*",
    r"[\d.,]+ (?:ms|us|s)(?= a step| a batch|\b)",
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d",
)
"""What is taken out of stderr and of logs before numbers are compared."""

NOISE = re.compile(
    r"^.*\.py:\d+: \w*Warning.*\n(?:[ \t]+.*\n)?|^\[W\d+ .*\n|^.*\[W:onnxruntime.*\n", re.MULTILINE
)
"""Warnings of libraries, with paths and lines of source."""

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*)(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w])|(?<=[x:=])\d+(?:\.\d+)?")

SAFE_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Types of safetensors by torch's names."""

RANDOM_ENTRY = ".data/serialization_id"
"""The entry of torch's archives that is a random number."""

TRACES = frozenset({"stack_trace", "nn_module_stack"})
"""Keys of an exported program that tell by which lines and classes of the source an operation was reached."""

HASH = re.compile(r"[0-9a-f]{12,64}")


def differing(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Name the places where two values of JSON differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        if list(before) != list(after) and set(before) == set(after):
            yield f"{place}: the keys have another order"
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in after or key not in before:
                yield f"{place}.{key}: only {'before' if key in before else 'after'}"
            else:
                yield from differing(before[key], after[key], f"{place}.{key}")
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{place}: {len(before)} items, then {len(after)}"
        for index, pair in enumerate(zip(before, after, strict=False)):
            yield from differing(*pair, f"{place}[{index}]")
    elif type(before) is not type(after) or (before != after and not (before != before and after != after)):
        yield f"{place}: {short(before)}, then {short(after)}"


def short(value: Any) -> str:
    """A value in a line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def masked(value: Any, keys: frozenset[str] = MEASURED) -> Any:
    """A JSON value without measured times, or without what some other keys hold."""
    if isinstance(value, dict):
        return {key: "masked" if key in keys else masked(item, keys) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item, keys) for item in value]
    return value


def without_times(text: str) -> str:
    """A text without measured times; a table with one has its columns' widths taken out, too."""
    found = text
    for pattern in TIMES:
        found = re.sub(pattern, "TIME", found)
    return found if found == text else re.sub(r" +", " ", re.sub(r"\u2500+", "\u2500", found))


def lines_differing(before: str, after: str) -> Iterator[str]:
    """Name the lines where two texts differ."""
    for number, (old, new) in enumerate(zip_longest(before.split("\n"), after.split("\n")), 1):
        if old != new:
            yield f"line {number}: {short(old)}, then {short(new)}"


def bytes_differing(before: bytes, after: bytes) -> Iterator[str]:
    """Say where two files differ first."""
    if before != after:
        first = next(
            (i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None
        )
        yield f"{len(before)} bytes, then {len(after)}; the first that differs is {first}"


# -- checkpoints ------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or a bare state dict, without cctool.

    Returns:
        `spec`, `history`, `digests`, `tensors` (name -> description and bytes, or the entry and the bytes of
        its parts) and `resume`, as far as the file has them.
    """
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        meta = header.pop("__metadata__", {})
        dense = {
            name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }
        document: dict[str, Any] = dict(meta)
        text = dense.pop("cctool.text", (None, None, None))[2]
        arena = dense.pop("cctool.arena", (None, None, b""))[2]
        resume = None
        document.pop("checksum", None)
    else:
        import torch

        document = torch.load(path, weights_only=True, map_location="cpu")
        if "cctool" not in document:
            return {"tensors": plain_tensors(document)}
        dense = plain_tensors(document.pop("model"))
        text = document.pop("text", None)
        text = None if text is None else text.numpy().tobytes()
        arena = document.pop("arena", torch.empty(0, dtype=torch.uint8)).numpy().tobytes()
        resume = document.pop("resume", None)
        if resume is not None:
            resume = {"state": json.loads(resume["state"]), "tensors": plain_tensors(resume["tensors"])}
    if text is not None:
        found = json.loads(zlib.decompress(text[4:]))
        # Where a part lies in the arena is compared, too: the form of the file must not change either.
        tensors = {
            name: dense[name] if entry is None else in_arena(entry, arena) for name, entry in found["index"]
        }
        document |= {key: found[key] for key in ("spec", "history")}
    else:
        tensors = dense
        document |= {
            key: json.loads(document[key]) for key in ("spec", "history", "digests") if key in document
        }
    return {**document, "tensors": tensors, "resume": resume}


def in_arena(entry: Any, arena: bytes) -> Any:
    """The entry of a tensor in the compact form, with the bytes that it names."""
    if not isinstance(entry, dict):
        return entry
    if "parts" in entry:
        parts = {key: in_arena(part, arena) for key, part in entry["parts"].items()}
        return {**{key: value for key, value in entry.items() if key != "parts"}, "parts": parts}
    size = int(re.sub(r"\D*", "", {"bool": "8", "bfloat16": "16"}.get(entry["dtype"], entry["dtype"]))) // 8
    for extent in entry["shape"]:
        size *= extent
    return (entry["dtype"], entry["shape"], entry["offset"], arena[entry["offset"] : entry["offset"] + size])


def plain_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as type, shape and bytes; of other values themselves."""
    import torch

    found = {}
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            flat = value.detach().contiguous().reshape(-1)
            content = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
            found[name] = (str(value.dtype), list(value.shape), content.numpy().tobytes())
        else:
            found[name] = value
    return found


def tensors_differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Name the tensors that differ, and in what."""
    if list(before) != list(after):
        gone, new = [n for n in before if n not in after], [n for n in after if n not in before]
        yield f"tensors: other names or order; gone {gone[:3]}, new {new[:3]}"
    for name in before:
        old, new = before[name], after.get(name)
        if name not in after or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted({*old, *new} - {"parts"}):
                if old.get(key) != new.get(key):
                    yield f"{name}: {key} {short(old.get(key))}, then {short(new.get(key))}"
            yield from tensors_differing(
                {f"{name}/{key}": part for key, part in old.get("parts", {}).items()},
                {f"{name}/{key}": part for key, part in new.get("parts", {}).items()},
            )
        elif isinstance(old, tuple) and isinstance(new, tuple):
            if old[:-1] != new[:-1]:
                yield f"{name}: {old[:-1]}, then {new[:-1]}"
            else:
                count = sum(a != b for a, b in zip(old[-1], new[-1], strict=True))
                yield f"{name}: {count} of {len(old[-1])} bytes"
        else:
            yield f"{name}: {short(old)}, then {short(new)}"


# -- other files ------------------------------------------------------------------------------------------


def workbook(path: Path) -> dict[str, Any]:
    """Cells of a workbook, formulas as they are, with number formats; and how many charts each sheet has."""
    import openpyxl

    book = openpyxl.load_workbook(path)
    return {
        sheet.title: {
            "frozen": sheet.freeze_panes,
            "charts": len(getattr(sheet, "_charts", ())),
            **{
                cell.coordinate: [
                    cell.value if not hasattr(cell.value, "isoformat") else "date",
                    cell.number_format,
                ]
                for line in sheet.iter_rows()
                for cell in line
                if cell.value is not None
            },
        }
        for sheet in book.worksheets
    }


def network(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Structure and metadata of an ONNX file, and its initializers as type, shape and bytes."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    graph = model.graph
    initializers = {}
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        initializers[tensor.name] = (tensor.data_type, list(values.shape), values.tobytes())
    structure = {
        "opset": {entry.domain: entry.version for entry in model.opset_import},
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "inputs": [str(value) for value in graph.input],
        "outputs": [str(value) for value in graph.output],
        "nodes": [node.SerializeToString(deterministic=True).hex() for node in graph.node],
    }
    return structure, initializers


def scalars(path: Path) -> dict[str, Any]:
    """All that a TensorBoard file of events holds, by tag, but times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    found: dict[str, Any] = {
        "scalars": {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in tags["scalars"]},
        "histograms": {
            tag: [[e.step, str(e.histogram_value)] for e in events.Histograms(tag)]
            for tag in tags["histograms"]
        },
        "tensors": {
            tag: [[e.step, str(e.tensor_proto)] for e in events.Tensors(tag)] for tag in tags["tensors"]
        },
    }
    for kind in found.values():
        for tag in kind:
            if any(word in tag for word in MEASURED_COLUMNS):
                kind[tag] = [step for step, _ in kind[tag]]
    return found


def pixels(path: Path) -> Any:
    """Size and bytes of a picture."""
    from matplotlib.image import imread

    image = imread(path)
    return [list(image.shape), hashlib.sha256(image.tobytes()).hexdigest()]


def without_columns(text: str) -> list[list[str]]:
    """Rows of a CSV without those that are measured times."""
    rows = list(csv.reader(io.StringIO(text)))
    dropped = {index for index, name in enumerate(rows[0] if rows else ()) if name in MEASURED_COLUMNS}
    return [[cell for index, cell in enumerate(row) if index not in dropped] for row in rows]


def entries(path: Path) -> dict[str, bytes]:
    """Content of the entries of a zip, without the name of its folder."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


class Comparison:
    """Two runs side by side.

    Args:
        before: folder with `work` and `said` of the first checkout.
        after: that of the second.
        checkouts: their paths, which may stand in what was printed.
        allowed: keys of options in histories that may differ.
    """

    def __init__(
        self, before: Path, after: Path, checkouts: Sequence[Path], allowed: frozenset[str] = frozenset()
    ) -> None:
        self.sides = (before, after)
        self.checkouts = checkouts
        self.allowed = allowed
        self._done = [
            json.loads((side / "said" / "done.json").read_text(encoding="utf-8")) for side in self.sides
        ]
        # The state for resuming holds times, so that files' hashes differ by chance; where options may
        # differ, so do content hashes and sizes of all files that remember them.
        self._known = [
            {**self._file_hashes(done), **(self._names(side / "work") if allowed else {})}
            for done, side in zip(self._done, self.sides, strict=True)
        ]

    def rows(self, plan: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A row a command: name, files, seconds of both, differences."""
        last: dict[str, str] = {}
        for record in self._done[0]:
            last |= dict.fromkeys(record["written"], record["name"])
        rows = []
        for old, new in zip(*self._done, strict=True):
            name = old["name"]
            found = list(self._command(old, new, plan[name]["status"]))
            # A file that a later command wrote again is compared as that command's.
            own = [path for path in old["written"] if last[path] == name and path in new["written"]]
            for path in own:
                found += [f"{path}: {text}" for text in self._file(path)]
            rows.append(
                {
                    "name": name,
                    "files": len(own),
                    "before": old["cpu"],
                    "after": new["cpu"],
                    "differences": found,
                }
            )
        return rows

    def _command(self, old: Mapping[str, Any], new: Mapping[str, Any], status: int) -> Iterator[str]:
        """What differs of exit status, written files and what was printed."""
        if old["status"] != new["status"]:
            yield f"exit status {old['status']}, then {new['status']}"
        if old["status"] != status:
            yield f"exit status {old['status']} before, where the plan says {status}"
        for key in ("written", "removed"):
            gone = [self._stable(name) for name in old[key]]
            came = [self._stable(name) for name in new[key]]
            if sorted(gone) != sorted(came):
                only = sorted(set(gone) - set(came)), sorted(set(came) - set(gone))
                yield f"{key}: only before {only[0]}, only after {only[1]}"
        stem = old["name"].replace(" ", "_")
        out = [(side / "said" / f"{stem}.out").read_text(encoding="utf-8") for side in self.sides]
        yield from (f"stdout: {text}" for text in self._stdout(*out))
        err = [(side / "said" / f"{stem}.err").read_text(encoding="utf-8") for side in self.sides]
        yield from (f"stderr: {text}" for text in self._numbers(*err))

    @staticmethod
    def _stable(name: str) -> str:
        return re.sub(r"events\.out\.tfevents.*", "events", name)

    def _stdout(self, before: str, after: str) -> Iterable[str]:
        texts = [self._translated(text, index) for index, text in enumerate((before, after))]
        try:
            documents = [json.loads(text) for text in texts]
        except ValueError:
            return lines_differing(*map(without_times, texts))
        shown = [json.dumps(masked(document), indent=2) + "\n" for document in documents]
        if self.allowed:
            documents = [self._without_allowed(document) for document in documents]
            return differing(masked(documents[0]), masked(documents[1]))
        unmasked = [json.dumps(document, indent=2) + "\n" for document in documents]
        if shown[0] == shown[1]:
            # The same values, but are they written in the same way?
            return (
                []
                if [unmasked[i] == texts[i] for i in (0, 1)] in ([True] * 2, [False] * 2)
                else ["other form"]
            )
        return differing(masked(documents[0]), masked(documents[1]))

    def _numbers(self, before: str, after: str) -> Iterator[str]:
        found = [self._figures(text, index) for index, text in enumerate((before, after))]
        if found[0] != found[1]:
            pairs = enumerate(zip_longest(*found))
            first = [f"number {i}: {old}, then {new}" for i, (old, new) in pairs if old != new]
            yield f"{len(found[0])} numbers, then {len(found[1])}; {'; '.join(first[:3])}"

    def _figures(self, text: str, index: int) -> list[str]:
        """All numbers of a text but measured times and sizes of exported programs, in their order."""
        text = NOISE.sub("", self._translated(text, index))
        text = re.sub(r"(\.pt2: pt2, )[\d,]+( bytes)", r"\1SIZE\2", text)
        return NUMBER.findall(without_times(text))

    def _translated(self, text: str, index: int) -> str:
        """A text without the checkout's path and, where options may differ, with files for their hashes."""
        for path, name in (
            (str(self.checkouts[index]), "CHECKOUT"),
            (str(self.sides[index]), "PLACE"),
        ):
            text = text.replace(path, name)
        known = self._known[index]
        text = HASH.sub(lambda match: known.get(match[0], match[0]), text)
        if not self.allowed:
            return text
        return re.sub(
            r"(?<![\d.])\d[\d,]*(?![\d.])", lambda match: known.get(match[0].replace(",", ""), match[0]), text
        )

    @staticmethod
    def _file_hashes(done: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Hashes of all checkpoints, also of those that were written over, and what stands for them."""
        found: dict[str, str] = {}
        for record in done:
            for digest, file in record["hashes"].items():
                found[digest] = found[digest[:12]] = f"<{file} of {record['name']}>"
        return found

    @staticmethod
    def _names(folder: Path) -> dict[str, str]:
        """Files by what stands for them in histories and tables: content hashes and sizes."""
        found: dict[str, str] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".pt", ".safetensors"):
                name = f"<{path.relative_to(folder).as_posix()}>"
                found[str(path.stat().st_size)] = name
                content = content_hash(read_checkpoint(path))
                if content is not None:
                    found |= {content: f"{name} content", content[:12]: f"{name} content"}
        return found

    def _without_allowed(self, value: Any) -> Any:
        """A JSON value without the keys of options that may differ."""
        if isinstance(value, dict):
            return {
                key: self._without_options(item) if key == "options" else self._without_allowed(item)
                for key, item in value.items()
            }
        return [self._without_allowed(item) for item in value] if isinstance(value, list) else value

    def _without_options(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: self._without_options(item) for key, item in value.items() if key not in self.allowed
            }
        return value

    # -- files ------------------------------------------------------------------------------------------

    def _file(self, name: str) -> Iterator[str]:
        paths = [side / "work" / name for side in self.sides]
        if not all(path.exists() for path in paths):
            return
        kinds: dict[str, Callable[[Path, Path], Iterable[str]]] = {
            ".pt": self._checkpoint,
            ".safetensors": self._checkpoint,
            ".xlsx": lambda old, new: differing(workbook(old), workbook(new)),
            ".onnx": self._onnx,
            ".png": lambda old, new: differing(pixels(old), pixels(new)),
            ".pt2": self._archive,
            ".csv": self._csv,
            ".json": self._json,
            ".txt": self._log,
            ".svg": self._svg,
        }
        if any(paths[0].match(pattern) for pattern in IGNORED):
            return
        contents = [path.read_bytes() for path in paths]
        if contents[0] == contents[1]:
            return
        if paths[0].name.startswith("events.out"):
            yield from differing(*map(scalars, paths))
        elif paths[0].suffix in kinds:
            yield from kinds[paths[0].suffix](*paths)
        else:
            yield from bytes_differing(*contents)

    def _checkpoint(self, old: Path, new: Path) -> Iterator[str]:
        before, after = read_checkpoint(old), read_checkpoint(new)
        found = [*tensors_differing(before.pop("tensors"), after.pop("tensors"))]
        resumes = [before.pop("resume", None), after.pop("resume", None)]
        if None not in resumes:
            found += [
                f"resume: {t}" for t in tensors_differing(*(resume.pop("tensors") for resume in resumes))
            ]
        found += [f"resume{text}" for text in differing(*map(masked, resumes))]
        documents = []
        for index, document in enumerate((before, after)):
            if None not in resumes:
                # Of the state for resuming, which was compared above: its digest is of measured times, too.
                document.pop("digest", None)
                document.get("digests", {}).pop("resume", None)
            text = json.dumps(document)
            documents.append(self._without_allowed(json.loads(self._translated_hashes(text, index))))
        found += [text.lstrip(".") for text in differing(*documents)]
        # Only times, and the hashes of files that hold times, excuse other bytes.
        excused = None not in resumes or before.get("history") != after.get("history")
        if not found and not self.allowed and not excused:
            found.append("equal in all that was read, but not to the byte")
        yield from found

    def _translated_hashes(self, text: str, index: int) -> str:
        known = self._known[index]
        return HASH.sub(lambda match: known.get(match[0], match[0]), text)

    def _onnx(self, old: Path, new: Path) -> Iterator[str]:
        before, after = network(old), network(new)
        structures = []
        for index, (structure, _) in enumerate((before, after)):
            structures.append(json.loads(self._translated_hashes(json.dumps(structure), index)))
        yield from differing(*structures)
        yield from tensors_differing(before[1], after[1])

    def _archive(self, old: Path, new: Path) -> Iterator[str]:
        before, after = entries(old), entries(new)
        yield from differing(sorted(before), sorted(after))
        for name in before.keys() & after.keys() - {RANDOM_ENTRY}:
            contents = [before[name], after[name]]
            if contents[0] != contents[1]:
                try:
                    texts = [
                        self._translated(content.decode(), index) for index, content in enumerate(contents)
                    ]
                    documents = [json.loads(text) for text in texts]
                except ValueError:
                    yield from (f"{name}: {text}" for text in bytes_differing(*contents))
                else:
                    pair = [masked(document, TRACES) for document in documents]
                    yield from (f"{name}{text}" for text in differing(*pair))

    def _csv(self, old: Path, new: Path) -> Iterator[str]:
        texts = [path.read_text(encoding="utf-8") for path in (old, new)]
        yield from differing(*(without_columns(text) for text in texts))

    def _json(self, old: Path, new: Path) -> Iterator[str]:
        texts = [
            self._translated(path.read_text(encoding="utf-8"), index) for index, path in enumerate((old, new))
        ]
        yield from differing(*(self._without_allowed(masked(json.loads(text))) for text in texts))

    def _log(self, old: Path, new: Path) -> Iterator[str]:
        texts = [path.read_text(encoding="utf-8") for path in (old, new)]
        if old.name == "command.txt":
            # The program's own path comes first.
            yield from differing(*([shlex.split(line)[1:] for line in text.splitlines()] for text in texts))
        else:
            yield from self._numbers(*texts)

    def _svg(self, old: Path, new: Path) -> Iterator[str]:
        """Pictures of lines, without their date and the random names of their parts."""
        texts = []
        for path in (old, new):
            text = re.sub(r"<dc:date>.*?</dc:date>", "", path.read_text(encoding="utf-8"))
            text = re.sub(r'(id="|url\(#|href="#)([a-zA-Z]+)[0-9a-f]{8,}', r"\1\2", text)
            texts.append(text)
        yield from lines_differing(*texts)


def content_hash(document: Mapping[str, Any]) -> str | None:
    """The content hash of a checkpoint, by docs/checkpoint-format.md; None of other files."""
    if "history" not in document:
        return None
    tensors = document["tensors"]
    digests = {name: tensor_digest(value, tensors) for name, value in tensors.items()}
    what = {"history": document["history"], "spec": document["spec"], "tensors": digests}
    return hashlib.sha256(canonical(what)).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def tensor_digest(value: Any, tensors: Mapping[str, Any]) -> str:
    """The digest of a tensor as `read_checkpoint` gives it."""
    if isinstance(value, str):
        return tensor_digest(tensors[value], tensors)
    if isinstance(value, dict):
        parts = {name: tensor_digest(part, tensors) for name, part in value["parts"].items()}
        return hashlib.sha256(canonical({**value, "parts": parts})).hexdigest()
    dtype = SAFE_TYPES.get(value[0], value[0].removeprefix("torch."))
    return hashlib.sha256(f"{dtype}{list(value[1])}".encode() + value[-1]).hexdigest()
