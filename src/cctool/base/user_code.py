"""The user's own code, named as ``path/to/net.py:factory`` or ``package.module:factory``.

Nothing here decides which code may run: callers pass the references that the command line names, and refuse
every other one before a file is opened. Standard library only.
"""

import hashlib
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from cctool.base.errors import CctoolError, UsageError, UserCodeError
from cctool.base.json_text import DoubledKeyError, read_json

PRIVATE_PREFIX = "cctool_user_"


def looks_like_user_code(reference: str) -> bool:
    """Whether ``reference`` has the form ``path/to/file.py:name`` or ``package.module:name``.

    >>> looks_like_user_code("net.py:make_net"), looks_like_user_code("resnet20")
    (True, False)
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not name.isidentifier():
        return False
    return place.endswith(".py") or all(part.isidentifier() for part in place.split("."))


def with_arguments(reference: str, arguments: Mapping[str, Any]) -> str:
    """A reference with the arguments of its function, which are JSON values, as files record it.

    >>> with_arguments("my.py:data", {"size": 32})
    'my.py:data {"size": 32}'
    """
    if not arguments:
        return reference
    return f"{reference} {json.dumps(dict(arguments), ensure_ascii=False)}"


def split_arguments(reference: str) -> tuple[str, dict[str, Any]]:
    """The two parts of what `with_arguments` makes; anything else has no arguments.

    >>> split_arguments('my.py:data {"size": 32}'), split_arguments("digits")
    (('my.py:data', {'size': 32}), ('digits', {}))
    """
    start = reference.find(" {")
    while start >= 0:
        try:
            arguments = read_json(reference[start + 1 :])
        except DoubledKeyError as error:
            raise UsageError(f"{reference}: {error}") from None
        # A recursion too deep is a text that was made to be one.
        except (ValueError, RecursionError):
            start = reference.find(" {", start + 1)
            continue
        if looks_like_user_code(reference[:start]):
            return reference[:start], arguments
        break
    return reference, {}


def is_named(reference: str, named: Collection[str]) -> bool:
    """Whether ``reference``, perhaps out of a checkpoint, is one of those that the command line names.

    Two spellings of one path are the same.
    """
    return _canonical(reference) in {_canonical(candidate) for candidate in named}


def load(reference: str) -> Callable[..., Any]:
    """Import the file or module of ``reference`` and return the function (or class) that it names.

    A file is imported once, under a private module name made of its path and content: two files called
    ``net.py`` do not clash, and an edited file is read again. It can import modules from its own folder.

    Raises:
        UserCodeError: there is no such file, module or function, or importing it raised.
    """
    place, _, name = reference.rpartition(":")
    module = _load_file(Path(place), reference) if place.endswith(".py") else _load_module(place, reference)
    function = getattr(module, name, None)
    if not callable(function):
        offered = ", ".join(
            sorted(
                key
                for key, value in vars(module).items()
                if callable(value) and getattr(value, "__module__", None) == module.__name__
            )
        )
        raise UserCodeError(
            f"{reference}: there is no function {name!r} in {place} (it has: {offered or 'no functions'})"
        )
    return function  # type: ignore[no-any-return]


def call(reference: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a user's function, so that an error names it and the line that raised.

    Raises:
        UserCodeError: the function raised; the message has the exception and the user's line.
    """
    with importable(reference):
        return _guarded(reference, lambda: function(*arguments, **named))


def call_often(reference: str, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """Call a user's function as `call` does, at full speed unless it fails.

    Preparing imports and finding the line to blame is too slow for every step or image, so a function that
    raised is called a second time, by `call`.
    """
    try:
        return function(*arguments, **more)
    except (Exception, SystemExit):
        return call(reference, function, *arguments, **more)


def _guarded(reference: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except CctoolError:
        raise
    # SystemExit, too: a script that calls sys.exit() at module level must not end the command silently.
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{reference} raised {_describe(error, reference)}") from error


def _describe(error: BaseException, reference: str) -> str:
    text = " ".join(str(error).split()) or "no message"
    summary = f"{type(error).__name__}: {text}"
    if isinstance(error, SyntaxError):
        return f"{summary} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    folder = str(_folder_of(reference))
    frames = [frame for frame in frames if frame.filename.startswith(folder)] or frames
    if not frames:
        return summary
    last = frames[-1]
    return f"{summary} ({Path(last.filename).name}, line {last.lineno}, in {last.name})"


def _load_file(path: Path, reference: str) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        raise UserCodeError(f"{reference}: there is no file {path}; name it as path/to/file.py:function")
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    module_name = f"{PRIVATE_PREFIX}{path.stem}_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserCodeError(f"{reference}: Python cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    # In sys.modules before it runs: dataclasses, pickle and multiprocessing look a class's module up there.
    sys.modules[module_name] = module
    try:
        with importable(reference):
            _guarded(reference, lambda: loader.exec_module(module))
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _load_module(name: str, reference: str) -> ModuleType:
    with importable(reference):
        try:
            return _guarded(reference, lambda: importlib.import_module(name))  # type: ignore[no-any-return]
        except UserCodeError as error:
            cause = error.__cause__
            missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
            if missing is None or not f"{name}.".startswith(f"{missing}."):
                raise
            raise UserCodeError(
                f"{reference}: there is no module {name!r} here or installed; name it as "
                "package.module:function or path/to/file.py:function"
            ) from cause


@contextmanager
def importable(reference: str) -> Iterator[None]:
    """Let modules in the folder of the user's file be imported by their own names, as pickled modules need.

    Afterwards ``sys.path``, and modules of the same names from other folders, are as before.
    """
    folder = _folder_of(reference)
    entry = str(folder)
    displaced = {name: module for name, module in sys.modules.items() if _is_shadowed(name, module, folder)}
    for name in displaced:
        del sys.modules[name]
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
        sys.modules.update(displaced)


def _is_shadowed(name: str, module: ModuleType, folder: Path) -> bool:
    """Whether ``name`` was imported from another folder although ``folder`` has a module of that name.

    A teacher and a student that each have a ``layers.py`` in their folders must each get their own.
    """
    if "." in name or name in sys.stdlib_module_names or name.startswith(PRIVATE_PREFIX):
        return False
    origin = getattr(module, "__file__", None)
    own = folder / f"{name}.py"
    return origin is not None and own.is_file() and Path(origin).resolve() != own.resolve()


def _folder_of(reference: str) -> Path:
    place = reference.rpartition(":")[0]
    return Path(place).expanduser().resolve().parent if place.endswith(".py") else Path.cwd()


def _canonical(reference: str) -> str:
    place, _, name = reference.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if place.endswith(".py") else reference
