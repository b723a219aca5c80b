"""An option, written once: a field of a frozen dataclass carries its flag, help, bounds and idle conditions.

    class PruneOptions(Options):
        rate: float = option(0.5, "Fraction of the units to remove.", bounds=between("[0, 1)"))
        data: DataOptions = nested(DataOptions)

`leaves` lists the options of a dataclass, nested ones included. The command line's signature, the keywords of
the Python functions, the checks, what history records and the tables in docs/ are all made from that list.
Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import partial
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from cctool.base.errors import UsageError

T = TypeVar("T", bound="Options")
# Kinds whose values neither the command line nor a history can make of text by themselves.
_FREE = re.compile(r"Path|tuple\[(?!str\b)")


class Choice(str, Enum):
    """An option's allowed values; prints as its value (StrEnum exists from Python 3.11 on only)."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Bounds:
    """The numbers that an option may take.

    Attributes:
        low, high: ends of the interval.
        low_open, high_open: whether an end itself is excluded.
        text: end of the error message for other numbers.
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    text: str = ""

    def hold(self, value: float) -> bool:
        """Whether a number is allowed; NaN never is."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below


def at_least(low: int) -> Bounds:
    """Numbers from ``low`` on."""
    return Bounds(low=low, text=f"{low} or more is allowed")


def positive() -> Bounds:
    """Finite numbers above 0."""
    return Bounds(low=0, low_open=True, high=math.inf, high_open=True, text="a positive number is needed")


def between(interval: str) -> Bounds:
    """An interval as mathematicians write it.

    >>> between("[0, 1)").hold(0), between("[0, 1)").hold(1)
    (True, False)
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    return Bounds(low, high, interval[0] == "(", interval[-1] == ")", f"{interval} is allowed")


@dataclass(frozen=True, eq=False, repr=False)
class Idle:
    """A condition under which options have no effect, so that giving one is refused.

    Attributes:
        when: the verb's options -> whether it holds.
        why: the error message; a function of the options if it contains their values.
    """

    when: Callable[[Any], bool]
    why: str | Callable[[Any], str]


@dataclass(frozen=True, eq=False, repr=False)
class OptionSpec:
    """The arguments of `option`, kept in the field's metadata."""

    help: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    panel: str = ""
    unset: str = ""
    bounds: Bounds | None = None
    parse: Callable[[str], Any] | None = None
    shown: str | None = None
    repeated: bool = False
    idle: tuple[Idle, ...] = ()
    runs_code: bool = False
    reads: bool = False
    writes: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class GroupSpec:
    """The arguments of `nested`, kept in the field's metadata."""

    kind: type
    prefix: str = ""
    without: tuple[str, ...] = ()
    changed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    panel: str = ""
    key: str | None = None


def option(
    default: Any,
    help: str,
    *flags: str,
    metavar: str | None = None,
    panel: str = "",
    unset: str = "",
    bounds: Bounds | None = None,
    parse: Callable[[str], Any] | None = None,
    shown: str | None = None,
    repeated: bool = False,
    idle: tuple[Idle, ...] | Idle = (),
    runs_code: bool = False,
    reads: bool = False,
    writes: bool = False,
    recorded: bool = True,
    if_given: bool = False,
) -> Any:
    """A field of an options dataclass that is an option of the command line.

    Args:
        default: its value if it is not given; ``...`` makes the option required.
        help: one or two sentences, without the default.
        flags: as click writes them, ``--per-channel/--per-tensor``; by default the field's name.
        metavar: the value's name in help.
        panel: heading in help and in the docs.
        unset: what None means, as help and docs describe the default.
        bounds: allowed numbers, for each item of a tuple.
        parse: text -> value, raising UsageError; for each item of a repeated option.
        shown: the default as text, if `parse` makes the value.
        repeated: whether it may be given several times; the value is a tuple.
        idle: conditions under which the option has no effect.
        runs_code: whether the value may name the user's code, which is thereby allowed to run.
        reads: whether the value is a file or folder that the command reads.
        writes: whether the value is a file or folder that the command writes.
        recorded: whether history stores it; options that do not influence the result are not stored.
        if_given: whether history stores it only if it is given, so that it can be added to a verb without
            changing what other calls store.
    """
    idle = (idle,) if isinstance(idle, Idle) else idle
    spec = OptionSpec(
        help, flags, metavar, panel, unset, bounds, parse, shown, repeated, idle, runs_code, reads, writes
    )
    value = MISSING if default is ... else default
    return field(default=value, metadata={"option": spec, "recorded": recorded, "if_given": if_given})


def section(panel: str) -> Callable[..., Any]:
    """`option` for the options under one heading."""
    return partial(option, panel=panel)


def nested(
    kind: type,
    default: Any = None,
    *,
    prefix: str = "",
    without: tuple[str, ...] = (),
    changed: Mapping[str, Mapping[str, Any]] | None = None,
    panel: str = "",
    key: str | None = None,
    if_given: bool = False,
) -> Any:
    """A field that holds another options dataclass, whose options become the verb's.

    Args:
        kind: the dataclass.
        default: the record whose values are the defaults; None makes one of `kind`.
        prefix: word before each of its flags.
        without: fields that the verb does not offer; ``*`` is all of them.
        changed: field -> arguments of `option` that are different here.
        panel: heading in help and docs, replacing those of its options.
        key: field without which the group is None and its other options have no effect.
        if_given: whether history stores the group only if one of its options is given.
    """
    spec = GroupSpec(kind, prefix, without, changed or {}, panel, key)
    metadata = {"group": spec, "if_given": if_given}
    if key is not None:
        return field(default=None, metadata=metadata)
    return field(default_factory=(lambda: default) if default is not None else kind, metadata=metadata)


@dataclass(frozen=True)
class Leaf:
    """One option of a verb.

    Attributes:
        path: names of the fields that lead to it.
        keyword: its name in Python.
        flags: its flags on the command line.
        kind: the field's annotation.
        default: its value if it is not given; `MISSING` makes it required.
        spec: its help, bounds and so on.
        keys: keywords that switch on the optional groups around it, the outermost first.
        is_key: whether it switches on its group.
        recorded: whether history stores it.
    """

    path: tuple[str, ...]
    keyword: str
    flags: tuple[str, ...]
    kind: Any
    default: Any
    spec: OptionSpec
    keys: tuple[str, ...] = ()
    is_key: bool = False
    recorded: bool = True

    @property
    def flag(self) -> str:
        """Its first long flag."""
        return self.flags[0].partition("/")[0]

    def flag_for(self, value: Any) -> str:
        """Its first long flag that gives a value: of a switch that is off, the one that switches it off."""
        return self.flags[0].partition("/")[2 if value is False else 0] or self.flag

    def value_in(self, options: Any) -> Any:
        """Its value in the verb's options; None in a group that there is not."""
        for name in self.path:
            options = getattr(options, name, None)
        return options

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING and not self.keys

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that its annotation allows, without None."""
        parts = get_args(self.kind) if isinstance(self.kind, UnionType) else (self.kind,)
        return tuple(part for part in parts if part is not type(None))

    @property
    def enum(self) -> type[Enum] | None:
        """The enum of its values; None if it is not limited to words."""
        if self.spec.parse is not None:
            return None
        return next((k for k in self.kinds if _is_class(k) and issubclass(k, Enum)), None)

    @property
    def help(self) -> str:
        """What it does, and its default if that is None."""
        return f"{self.spec.help} Default: {self.spec.unset}." if self.spec.unset else self.spec.help

    def read(self, value: Any) -> Any:
        """Turn text or a value into the field's value.

        Raises:
            UsageError: if it is of another type, or text that cannot be parsed.
        """
        if self.spec.repeated:
            items = [value] if isinstance(value, str) or value is None else value
            if not isinstance(items, (list, tuple)) or any(isinstance(item, (bool, int)) for item in items):
                raise UsageError(
                    f"{self.flag} {value!r}: a list of {self.spec.metavar or 'text'} is expected"
                )
            return None if value is None else tuple(map(self._item, items))
        return self._item(value)

    def _item(self, value: Any) -> Any:
        if self.spec.parse is not None:
            try:
                return self._parsed(value)
            except UsageError as error:
                raise UsageError(self._named(str(error))) from None
        if self.enum is not None and value is not None:
            words = [str(item.value) for item in self.enum]
            if str(value) not in words:
                raise UsageError(f"{self.flag} {value}: {', '.join(words)} is allowed")
            return self.enum(str(value))
        # So that history is the same for 1 and 1.0.
        if float in self.kinds and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        simple = tuple(kind for kind in self.kinds if kind in (bool, int, float, str))
        # A bool is an int in Python, but not a number here.
        wrong = not isinstance(value, simple) or (isinstance(value, bool) and bool not in simple)
        if value is not None and not self.spec.repeated and simple and wrong:
            names = " or ".join(kind.__name__ for kind in simple)
            raise UsageError(f"{self.flag} {value!r}: {names} is expected")
        return tuple(value) if isinstance(value, list) else value

    def _named(self, text: str) -> str:
        """An error of the parser, which knows the flag without the prefix of its group."""
        flag, blank, rest = text.partition(" ")
        return f"{self.flag}{blank}{rest}" if self.flag.endswith(flag[1:]) else text

    def _parsed(self, value: Any) -> Any:
        """What text means, or a value that stands for text: 8 for ``8``, (3, 32, 32) for ``3x32x32``."""
        made = [kind for kind in self.kinds if _is_class(kind) and kind not in (int, float)]
        made += [kind for kind in get_args(self.kinds[0]) if _is_class(kind) and self.spec.repeated]
        ready = isinstance(value, tuple(made)) and not isinstance(value, str)
        if value is None or ready or value in ((), []):
            return value
        texts = [str(value)] if isinstance(value, (str, int, float)) else []
        if isinstance(value, (tuple, list)):
            texts = [separator.join(map(str, value)) for separator in "x,:"]
        if len(texts) == 1 and self.spec.parse is not None:
            return self.spec.parse(texts[0])
        for text in texts:
            with suppress(UsageError):
                return self.spec.parse(text) if self.spec.parse is not None else value
        raise UsageError(f"{self.flag} {value!r}: {self.spec.metavar or 'another value'} is expected")


def _is_class(kind: Any) -> bool:
    # In Python 3.10, tuple[int, ...] is an instance of type, too.
    return isinstance(kind, type) and get_origin(kind) is None


class Options:
    """Base of the options dataclasses: checks bounds and clashes, and reports all errors together."""

    def __post_init__(self) -> None:
        problems = [*self._outside(), *(text for wrong, text in self.clashes() if wrong)]
        if problems:
            raise UsageError("; ".join(problems))

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Options that exclude each other: (whether they are given so, the error message)."""
        return ()

    def _outside(self) -> Iterator[str]:
        for item in fields(self):  # type: ignore[arg-type]
            spec = item.metadata.get("option")
            if spec is None or spec.bounds is None:
                continue
            value = getattr(self, item.name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not spec.bounds.hold(number):
                    yield f"{_flags(item.name, spec, '')[0]} {number}: {spec.bounds.text}"


def leaves(kind: type) -> tuple[Leaf, ...]:
    """All options of a dataclass in the order of its fields, those of nested groups included."""
    return tuple(leaves_of(GroupSpec(kind)))


def leaves_of(spec: GroupSpec, default: Any = None, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """The options of a group at a path of fields; without a ``default`` record those of the fields count."""
    hints = get_type_hints(spec.kind)
    for item in fields(spec.kind):
        if item.name in spec.without or "*" in spec.without:
            continue
        value = item.default if default is None else getattr(default, item.name)
        inner: GroupSpec | None = item.metadata.get("group")
        if inner is not None:
            nested = (
                item.default_factory() if default is None and item.default_factory is not MISSING else value
            )
            inner = replace(inner, prefix=inner.prefix or spec.prefix, panel=inner.panel or spec.panel)
            for leaf in leaves_of(inner, None if inner.key else nested, (*path, item.name)):
                yield _gated(leaf, inner, (*path, item.name))
            continue
        if "option" not in item.metadata:
            continue
        told = replace(item.metadata["option"], **spec.changed.get(item.name, {}))
        told = replace(told, panel=spec.panel or told.panel)
        if told.parse is None and _FREE.search(str(hints[item.name])):
            raise TypeError(f"{spec.kind.__name__}.{item.name}: {hints[item.name]} needs a parse function")
        flags = _flags(item.name, told, spec.prefix if "flags" not in spec.changed.get(item.name, {}) else "")
        yield Leaf(
            path=(*path, item.name),
            keyword=flags[0].partition("/")[0].lstrip("-").replace("-", "_"),
            flags=flags,
            kind=hints[item.name],
            default=value,
            spec=told,
            recorded=bool(item.metadata.get("recorded", True)),
        )


def _flags(name: str, spec: OptionSpec, prefix: str) -> tuple[str, ...]:
    flags = spec.flags or (f"--{name.replace('_', '-')}",)
    return tuple(f"--{prefix}-{flag[2:]}" for flag in flags) if prefix else flags


def _gated(leaf: Leaf, inner: GroupSpec, path: tuple[str, ...]) -> Leaf:
    """Record in an option of an optional group which option switches on the group."""
    if inner.key is None:
        return leaf
    if leaf.path == (*path, inner.key):
        return replace(leaf, is_key=True, keys=(leaf.keyword, *leaf.keys))
    key = next(found for found in leaves_of(inner, None, path) if found.path == (*path, inner.key))
    return replace(leaf, keys=(key.keyword, *leaf.keys))


def assemble(
    kind: type[T],
    given: Mapping[str, Any],
    base: Mapping[tuple[str, ...], Any] | None = None,
    *,
    of: Iterable[Leaf] | None = None,
) -> T:
    """Make a record of options.

    Args:
        kind: its dataclass.
        given: keyword -> value, as `Leaf.read` gives it; others keep their defaults.
        base: path -> value of options that are not given, in place of their defaults.
        of: the options of the dataclass, if a verb changed some.

    Raises:
        UsageError: if a value is outside its bounds, or two exclude each other.
    """
    values = dict(base or {})
    values |= {leaf.path: given[leaf.keyword] for leaf in of or leaves(kind) if leaf.keyword in given}
    result: T = _built(kind, values, (), None)
    return result


def _built(kind: type, values: Mapping[tuple[str, ...], Any], path: tuple[str, ...], default: Any) -> Any:
    made: dict[str, Any] = {}
    for item in fields(kind):
        place = (*path, item.name)
        inner: GroupSpec | None = item.metadata.get("group")
        if inner is None:
            if place in values:
                made[item.name] = values[place]
        elif inner.key is None:
            record = getattr(default, item.name) if default is not None else None
            if record is None and item.default_factory is not MISSING:
                record = item.default_factory()
            with _saying_prefix(inner):
                made[item.name] = _built(inner.kind, values, place, record)
        elif values.get((*place, inner.key)) is not None:
            made[item.name] = _built(inner.kind, values, place, None)
    return kind(**made) if default is None else replace(default, **made)


@contextmanager
def _saying_prefix(group: GroupSpec) -> Iterator[None]:
    """Let errors of a group whose flags have a prefix name them with it."""
    try:
        yield
    except UsageError as error:
        if not group.prefix:
            raise
        plain = leaves_of(replace(group, prefix=""))
        flags = {one.flag: other.flag for one, other in zip(plain, leaves_of(group), strict=True)}
        named = re.sub(r"(?<![\w-])--[\w-]+", lambda found: flags.get(found[0], found[0]), str(error))
        raise UsageError(named) from None


def idle_problems(options: Any, of: Iterable[Leaf], given: Collection[str]) -> list[str]:
    """Error messages for options of a verb that were given and have no effect."""
    found: dict[str, list[str]] = {}
    of = tuple(of)
    free = {leaf.keyword for leaf in of if not leaf.keys or leaf.is_key}
    flags = {leaf.keyword: leaf.flag for leaf in of}
    for leaf in of:
        if leaf.keyword not in given:
            continue
        for rule in leaf.spec.idle:
            if rule.when(options):
                why = rule.why if isinstance(rule.why, str) else rule.why(options)
                found.setdefault(why, []).append(leaf.flag_for(leaf.value_in(options)))
        for key in leaf.keys:
            if key not in given and leaf.keyword not in free:
                found.setdefault(f"there is no {flags[key]}", []).append(leaf.flag)
    return [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in found.items()]


def recorded(options: Any) -> dict[str, Any]:
    """Options as history stores them: JSON, without those that do not influence the result."""
    result = _plain(options)
    return result if isinstance(result, dict) else {}


def _is_given(item: Any) -> bool:
    return any(map(_is_given, item.values())) if isinstance(item, dict) else item not in (None, [], False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        idle = getattr(value, "unrecorded", ())
        kept = [f for f in fields(value) if f.metadata.get("recorded", True) and f.name not in idle]
        found = {item.name: _plain(getattr(value, item.name)) for item in kept}
        optional = {item.name for item in kept if item.metadata.get("if_given")}
        return {name: item for name, item in found.items() if name not in optional or _is_given(item)}
    if hasattr(value, "as_recorded"):
        return value.as_recorded()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    # JSON has no NaN and no infinity.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
