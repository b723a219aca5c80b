"""Open the checkpoint that a command line names: a file of cctool's, a foreign file, or a fresh network."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cctool.base import user_code
from cctool.base.errors import ArchitectureError, CheckpointError, SpecError, UsageError
from cctool.base.json_text import DoubledKeyError, read_json
from cctool.base.networks import some
from cctool.base.runtime import Reporter
from cctool.checkpoint.build import build_fresh, instantiate
from cctool.checkpoint.checkpoint import Checkpoint, Opened, build, open_file
from cctool.checkpoint.file.payload import parse
from cctool.checkpoint.foreign import match_names
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.checkpoint.tables import Tables
from cctool.graph.heads import output_layers
from cctool.models import registry
from cctool.options.common import ModelOptions

# Heights and widths to try, the commonest in image classification first.
_COMMON_SIZES = (32, 224, 28, 64, 96, 128, 256, 299, 16, 8)


@dataclass(frozen=True)
class DataShape:
    """What a data set asks of a network: input shape (C, H, W), classes and preprocessing."""

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    preprocessing: Preprocessing | None


def parse_arguments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Parse ``key=value`` strings; a value that is not JSON is taken as text.

    >>> parse_arguments(("num_classes=11", "act=relu"))
    {'num_classes': 11, 'act': 'relu'}
    """
    arguments = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            arguments[key] = read_json(text)
            # Python reads NaN and 1e999, which no file can hold.
            json.dumps(arguments[key], allow_nan=False)
        except DoubledKeyError as error:
            raise UsageError(f"{pair}: {error}") from None
        except ValueError:
            arguments[key] = text
    return arguments


def fresh(
    options: ModelOptions,
    tables: Tables,
    named: frozenset[str],
    data: DataShape | None,
    reference: str | None,
) -> Checkpoint:
    """Build and initialise the network that ``--arch`` names.

    ``data`` gives channels, classes, input size and preprocessing that the command line does not; the spec
    remembers its ``reference``. ``named`` is the user code that may run.
    """
    if options.arch is None:
        raise UsageError(
            "there is no INPUT, so --arch must name the network to build; `cctool models` lists them"
        )
    given = parse_arguments(options.arguments)
    arguments = registry.defaults(
        options.arch,
        channels=options.input_shape[0] if options.input_shape else data.shape[0] if data else None,
        classes=(len(data.classes) or None) if data else None,
        arguments=given,
        user_code=named,
    )
    shape = options.input_shape or registry.input_shape(options.arch, arguments, data.shape if data else None)
    spec = ModelSpec(
        architecture=options.arch,
        arguments=arguments,
        input_shape=shape,
        classes=(data.classes or None) if data else None,
        preprocessing=_preprocessing(options) or (data.preprocessing if data else None),
        data=reference,
    )
    return Checkpoint(build_fresh(spec, tables), spec)


def pretrained(
    options: ModelOptions, tables: Tables, reference: str | None, reporter: Reporter
) -> Checkpoint:
    """Build the library's network that ``--arch`` names with its published weights, as a foreign file's.

    Input size, preprocessing and classes are those of the weights unless the command line gives others; the
    spec remembers the data set's ``reference``.

    Raises:
        UsageError: if no network is named, or with other arguments than its weights need.
        ArchitectureError: if there are no published weights, or they are not there and not to be downloaded.
        CheckpointError: if the file is damaged or fits another network.
    """
    if options.arch is None:
        raise UsageError("--pretrained needs --arch torchvision:NAME or timm:NAME")
    found = registry.published(options.arch)
    given = parse_arguments(options.arguments)
    for key, value in given.items():
        if found.arguments.get(key, value) != value:
            raise UsageError(
                f"--arg {key}={value}: the published weights of {options.arch} need {key}="
                f"{found.arguments[key]}" + ("; --new-head changes the classes" if "classes" in key else "")
            )
    opened = open_file(found.fetch())
    spec = ModelSpec(
        architecture=options.arch,
        arguments={**found.arguments, **given},
        input_shape=options.input_shape or found.input_shape,
        classes=found.classes,
        preprocessing=_preprocessing(options) or Preprocessing(mean=found.mean, std=found.std),
        data=reference,
    )
    reporter.note(
        f"published weights of {options.arch}: {found.label}, {found.arguments['num_classes']} classes, "
        f"input {'x'.join(map(str, spec.input_shape))}"
    )
    origin = opened.origin.model_copy(update={"path": found.label})
    return build(replace(opened, origin=origin), spec, tables)


def open_checkpoint(
    path: Path,
    options: ModelOptions,
    tables: Tables,
    named: frozenset[str],
    reporter: Reporter,
    data: Callable[[], DataShape | None] = lambda: None,
    *,
    new_head: bool = False,
) -> Checkpoint:
    """Load a file, cctool's or foreign, as the command line describes it.

    ``data`` opens the data that give the input size of a foreign network; ``named`` is the user code that may
    run. With ``new_head`` a foreign file may lack the last layer, whose weights are random then.

    Raises:
        CheckpointError: if it is missing, damaged, unsafe, or foreign and its architecture is not given.
        UsageError: if the command line contradicts the file.
    """
    with _classes_at_hand(options):
        opened = open_file(path, trust_pickle=options.trust_pickle)
    if opened.payload is not None:
        return build(opened, _adjusted(opened.payload.spec, options, path), tables)
    if options.spec is not None:
        return build(opened, _overridden(_read_spec(options.spec), options, f"--spec {options.spec}"), tables)
    if options.arch is None:
        raise CheckpointError(
            f"{path} does not say which network it holds; name it with --arch, "
            "as in --arch torchvision:resnet18"
        )
    spec = _foreign_spec(opened, options, tables, named, data())
    if new_head:
        opened = _with_last_layer(opened, spec, tables, path, reporter)
    reporter.note(
        f"{path} is foreign: loaded {len(opened.tensors or ())} tensors into {spec.architecture}, "
        f"input {'x'.join(map(str, spec.input_shape))}"
        + ("" if spec.preprocessing else "; its preprocessing is unknown (--mean, --std)")
    )
    return build(opened, spec, tables)


def recorded_architecture(path: Path) -> str | None:
    """The architecture that a file of ours records; None for a foreign one.

    Raises:
        CheckpointError: if it is missing, damaged or unsafe.
    """
    payload = open_file(path).payload
    return None if payload is None else payload.spec.architecture


@contextlib.contextmanager
def _classes_at_hand(options: ModelOptions) -> Iterator[None]:
    """Let a trusted pickle find the classes that the user's file defines.

    A module that was saved by ``python net.py`` names its class ``__main__.Net``, so the file's classes are
    lent to ``__main__`` while the pickle is read.
    """
    if options.arch is None or not options.trust_pickle or not registry.is_user_code(options.arch):
        yield
        return
    defined = vars(sys.modules[user_code.load(options.arch).__module__])
    main = sys.modules["__main__"]
    lent = [name for name, value in defined.items() if isinstance(value, type) and not hasattr(main, name)]
    for name in lent:
        setattr(main, name, defined[name])
    try:
        with user_code.importable(options.arch):
            yield
    finally:
        for name in lent:
            delattr(main, name)


def _adjusted(spec: ModelSpec, options: ModelOptions, path: Path) -> ModelSpec:
    if options.spec is not None:
        raise UsageError(f"{path} has a spec of its own; --spec is for bare state dicts")
    named, present = options.arch, spec.architecture
    if named is not None and named != present:
        # The user's file may have moved since: --arch says where it is now.
        if not (registry.is_user_code(named) and registry.is_user_code(present)):
            raise UsageError(f"{path} holds {present}, --arch says {named}: leave --arch out")
        spec = spec.model_copy(update={"architecture": named})
    for key, value in parse_arguments(options.arguments).items():
        if spec.arguments.get(key) != value:
            there = f"with {key}={spec.arguments[key]!r}" if key in spec.arguments else f"without {key}"
            raise UsageError(f"{path} was built {there}, --arg says {value!r}: leave it out")
    return _overridden(spec, options, str(path))


def _shown(values: tuple[float, ...]) -> str:
    return ",".join(map(str, values))


def _overridden(spec: ModelSpec, options: ModelOptions, whose: str) -> ModelSpec:
    """The spec with what the command line adds; ``whose`` it is begins the error if both contradict."""
    update: dict[str, Any] = {}
    known, given = spec.preprocessing, _preprocessing(options)
    if known is not None and given not in (None, known):
        raise UsageError(
            f"{whose} says that inputs are normalised with mean {_shown(known.mean)} and std "
            f"{_shown(known.std)}: leave --mean and --std out, which say otherwise"
        )
    if options.input_shape is not None:
        update["input_shape"] = options.input_shape
    if options.mean is not None:
        update["preprocessing"] = given
    return spec.model_copy(update=update)


def _preprocessing(options: ModelOptions) -> Preprocessing | None:
    if options.mean is None or options.std is None:
        return None
    return Preprocessing(mean=options.mean, std=options.std)


def _read_spec(path: str) -> ModelSpec:
    try:
        text = Path(path).read_text(encoding="utf-8")
        # Whatever else is wrong with it, `parse` says better.
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            read_json(text)
        return parse(ModelSpec, text, "spec")
    except (OSError, UnicodeDecodeError, DoubledKeyError) as error:
        raise CheckpointError(f"--spec {path}: {error}") from None


def _foreign_spec(
    opened: Opened, options: ModelOptions, tables: Tables, named: frozenset[str], data: DataShape | None
) -> ModelSpec:
    """Build a spec for bare tensors; they tell channels and classes that the command line does not give."""
    arch, tensors = str(options.arch), dict(opened.tensors or {})
    given = parse_arguments(options.arguments)
    channels = options.input_shape[0] if options.input_shape else None
    # First with the architecture's own defaults, then with the widths of the tensors.
    attempts = [
        {"channels": channels, "classes": None},
        {"channels": channels or _channels(tensors), "classes": _classes(tensors)},
    ]
    for attempt in attempts:
        arguments = registry.defaults(arch, **attempt, arguments=given, user_code=named)
        shape = options.input_shape or _input_shape(arch, arguments, tables, tensors, data)
        spec = ModelSpec(
            architecture=arch, arguments=arguments, input_shape=shape, preprocessing=_preprocessing(options)
        )
        with contextlib.suppress(ArchitectureError, SpecError):
            if _fits(spec, tables, tensors):
                return spec
    # Neither fits: building by the command line alone gives the error that the user can act on.
    arguments = registry.defaults(arch, **attempts[0], arguments=given, user_code=named)
    return spec.model_copy(update={"arguments": arguments})


def _with_last_layer(
    opened: Opened, spec: ModelSpec, tables: Tables, path: Path, reporter: Reporter
) -> Opened:
    """A foreign file with random tensors for its last layer, if it lacks just these or has other shapes."""
    model = build_fresh(spec, tables)
    expected, tensors = model.state_dict(), match_names(model, dict(opened.tensors or {}))
    lacking = [
        name for name, value in expected.items() if name not in tensors or tensors[name].shape != value.shape
    ]
    if not lacking:
        return opened
    try:
        heads = output_layers(model, (torch.zeros(2, *spec.input_shape),))
    # What was built for a file that does not fit may not run; building it again says what is missing.
    except Exception:
        return opened
    if any(name.rpartition(".")[0] not in heads for name in lacking):
        return opened
    reporter.note(f"{path} has no fitting {some(lacking)}: random values take their place")
    return replace(opened, tensors={**tensors, **{name: expected[name] for name in lacking}})


def _input_shape(
    arch: str,
    arguments: Mapping[str, Any],
    tables: Tables,
    tensors: Mapping[str, Tensor],
    data: DataShape | None,
) -> tuple[int, int, int]:
    """The input shape (C, H, W) of an architecture; for the user's own, the first common size that runs."""
    if data is not None or not registry.is_user_code(arch):
        return registry.input_shape(arch, arguments, data.shape if data else None)
    model = tables.build(arch, arguments).eval()
    channels = _channels(tensors) or 3
    for size in _COMMON_SIZES:
        # On a size that does not fit, the user's code may raise anything. Batch norm needs a batch of two.
        with contextlib.suppress(Exception), torch.no_grad():
            model(torch.zeros(2, channels, size, size))
            return channels, size, size
    raise ArchitectureError(f"{arch}: its input size is not known; give --input CxHxW, or --data")


def _fits(spec: ModelSpec, tables: Tables, tensors: Mapping[str, Tensor]) -> bool:
    model = instantiate(spec, tables, tensors)
    expected = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return expected == {name: value.shape for name, value in match_names(model, tensors).items()}


def _channels(tensors: Mapping[str, Tensor]) -> int | None:
    # The first convolution's weight is (out, in, H, W); the last matrix's rows are the classes.
    return next((int(value.shape[1]) for value in tensors.values() if value.dim() == 4), None)


def _classes(tensors: Mapping[str, Tensor]) -> int | None:
    return next(
        (int(value.shape[0]) for value in reversed(list(tensors.values())) if value.dim() in (2, 4)), None
    )
