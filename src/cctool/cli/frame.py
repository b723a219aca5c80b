"""The frame in which every command runs: its options, its operation, and errors in one line."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from signal import SIGINT, SIGTERM
from typing import Any

import typer

from cctool.base.errors import CctoolError, UsageError
from cctool.cli.console import Console
from cctool.options.verbs import Frame, Verb


@dataclass(frozen=True)
class Invocation:
    """One call of a command.

    Attributes:
        verb: the command.
        console: where it prints.
        inputs: its arguments as given.
        given: keyword -> value of the options that were given.
        frame: the options that every command has.
        resumed: path -> value of the options of the training that it resumes.
        output: path of the product; None for the default.
        said: notes that were given, which a command gives once, however many files it reads.
    """

    verb: Verb
    console: Console
    inputs: tuple[str, ...]
    given: Mapping[str, Any]
    frame: Frame
    output: str | None = None
    resumed: Mapping[tuple[str, ...], Any] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    @classmethod
    def parsed(cls, verb: Verb, context: typer.Context, inputs: Any, values: Mapping[str, Any]) -> Invocation:
        """Make a call of what Typer parsed; ``values`` are by keyword, defaults included."""
        found = {name: value for name, value in values.items() if _is_given(context, name)}
        given = verb.read(found)
        frame = verb.frame_of(given)
        talk = frame.talk
        console = Console(quiet=talk.quiet, as_json=talk.as_json, debug=talk.debug)
        sources = () if inputs is None else (inputs,) if isinstance(inputs, str) else tuple(inputs)
        return cls(verb, console, sources, given, frame, frame.output.output)

    @property
    def source(self) -> str | None:
        """INPUT as it was given."""
        return self.inputs[0] if self.inputs else None

    @functools.cached_property
    def options(self) -> Any:
        """The verb's options.

        Raises:
            UsageError: if they exclude each other, or one would have no effect.
        """
        more = {"begun": self.resumed} if self.resumed else {}
        return self.verb.options_of(self.given, **more)

    def write(self, told: Callable[[Any], Iterable[Any]], *, resumes: bool = False) -> None:
        """Carry out a verb that writes checkpoints, and print the path of each.

        ``told`` turns a product's report into tables and sentences for stderr; ``resumes`` says whether the
        command continues its earlier run.
        """
        from cctool.operations import pipeline

        options = self.options
        products = []
        with self.console.products_only():
            for product in pipeline.write(self._operation(), options, self.request(resumes=resumes)):
                for item in told(product.report):
                    self.console.tell(item)
                self.console.path(product.path)
                products.append(product)
            self.console.document({"products": products})

    def read(
        self,
        source: str | None = None,
        carry_out: Callable[..., Any] | None = None,
        arch: str | None = None,
    ) -> Any:
        """Carry out a verb that writes no checkpoint, and return its report.

        ``source``, ``carry_out`` and ``arch`` replace the command's input, the verb's operation and the
        architecture that the command line names.
        """
        from cctool.operations import pipeline

        options = self.options
        with self.console.products_only():
            request = self.request(source)
            if arch is not None:
                request = replace(request, model=replace(request.model, arch=arch))
            return pipeline.read(carry_out or self._operation(), options, request)

    def request(self, source: str | None = None, *, resumes: bool = False) -> Any:
        """The request to the pipeline, with the input ``-`` replaced by the path from stdin."""
        from cctool.operations.pipeline import Request

        source = source or self.source
        return Request(
            verb=self.verb.name,
            source=None if source is None else resolved_source(source),
            output=self.output,
            force=self.frame.output.force,
            allow_nonfinite=self.frame.output.allow_nonfinite,
            model=self.frame.model,
            runtime=self.frame.runtime,
            user_code=self.verb.references(self.given),
            reporter=self.console,
            resumes=resumes,
            said=self.said,
            given=frozenset(self.given),
        )

    def _operation(self) -> Callable[..., Any]:
        from importlib import import_module

        module, _, name = self.verb.carried_out.partition(":")
        operation: Callable[..., Any] = getattr(import_module(f"cctool.operations.{module}"), name)
        return operation


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line, rather than at its default."""
    # Typer passes defaults like given values; click remembers which are which.
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def resolved_source(source: str) -> str:
    """INPUT itself, or the path from stdin if INPUT is ``-``.

    Raises:
        UsageError: if stdin is a terminal.
        CctoolError: unless stdin gives exactly one path.
    """
    if source != "-":
        return source
    lines = _piped()
    if len(lines) > 1:
        raise CctoolError(f"{len(lines)} paths came from stdin, one is expected: {', '.join(lines)}")
    return lines[0]


def resolved_sources(sources: tuple[str, ...]) -> tuple[str, ...]:
    """The inputs of a command that takes several; ``-`` stands for all paths from stdin.

    Raises:
        UsageError: if ``-`` is given twice, or stdin is a terminal.
        CctoolError: if no path comes from stdin.
    """
    if sources.count("-") > 1:
        raise UsageError("- stands for all paths from stdin: give it once")
    return tuple(path for source in sources for path in (_piped() if source == "-" else [source]))


def _piped() -> list[str]:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("INPUT is -, which reads paths from stdin, but nothing is piped into this command")
    lines = [line.strip() for line in sys.stdin.read().splitlines() if line.strip()]
    if not lines:
        raise CctoolError("no path came from stdin: the command before this one failed, or wrote no file")
    return lines


class Terminated(KeyboardInterrupt):
    """The program was asked to end by SIGTERM, as batch systems do."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors of ``command`` into one line on stderr and an exit status."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = bool(kwargs.get("debug"))
        try:
            command(*args, **kwargs)
        except CctoolError as error:
            if debug:
                traceback.print_exc()
            Console().error(str(error))
            raise typer.Exit(error.exit_status) from None
        except SystemExit as error:
            # The code of the user's network may end the program, which must not look like success.
            if debug:
                traceback.print_exc()
            Console().error(f"code that the command ran ended the program (SystemExit: {error.code})")
            raise typer.Exit(1) from None
        except KeyboardInterrupt as ended:
            terminated = isinstance(ended, Terminated)
            Console().error("terminated" if terminated else "interrupted")
            # As shells count a program that a signal ends.
            raise typer.Exit(128 + (SIGTERM if terminated else SIGINT)) from None
        except BrokenPipeError:
            # The reader of stdout is gone; Python would raise again when it flushes stdout at exit.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - lives until the process ends
            raise typer.Exit(1) from None
        except OSError as error:
            # A full disk or a read-only folder is not a fault of cctool.
            if debug:
                traceback.print_exc()
            place = f"{error.filename}: " if error.filename is not None else ""
            Console().error(f"{place}{error.strerror or error}")
            raise typer.Exit(1) from None
        except MemoryError:
            Console().error("out of memory; a smaller --batch-size or --limit may fit")
            raise typer.Exit(1) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            summary = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            Console().error(f"unexpected {summary} (a fault of cctool; --debug shows where)")
            raise typer.Exit(1) from None

    return run
