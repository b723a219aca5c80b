"""Options that several commands share, and the frame in which every command runs."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Optional

import typer

from cctool.base.errors import CctoolError, UsageError
from cctool.cli.console import Console
from cctool.options.common import (
    DataOptions,
    ModelOptions,
    Precision,
    RuntimeOptions,
    parse_shape,
    parse_values,
)

__all__ = ["Invocation", "guarded"]

# Typer evaluates these at run time, and `X | None` inside Annotated is fine from Python 3.10 on; Optional is
# kept where an alias would otherwise hide that the option may be absent.
Source = Annotated[
    str, typer.Argument(metavar="INPUT", help="Checkpoint to read; - takes its path from stdin.")
]
OptionalSource = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(metavar="[INPUT]", help="Checkpoint to go on from; - takes its path from stdin."),
]
Output = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--output", "-o", help="Where to write; .pt or .safetensors. Default: INPUT's stem and the verb."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Write even NaN or infinite weights.")
]
Arch = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Architecture: resnet20, torchvision:NAME, timm:NAME, net.py:factory. See `cctool models`."
    ),
]
Arg = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--arg", metavar="KEY=VALUE", help="Argument of the architecture; may be repeated."),
]
Input = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--input", metavar="CxHxW", help="Size of one input."),
]
Mean = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="M,M,M", help="Mean that a foreign model's inputs are centred by (image in 0..1)."),
]
Std = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="S,S,S", help="Standard deviation that a foreign model's inputs are divided by."),
]
Spec = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--spec", metavar="FILE.json", help="Spec to build a bare state dict with."),
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Let a foreign file run the code that it contains. Dangerous.")
]
Data = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Data set: digits, cifar10[:DIR], folder:DIR, ... Default: the checkpoint's last."),
]
ValData = Annotated[Optional[str], typer.Option(help="Data set that replaces the validation split.")]  # noqa: UP045
TestData = Annotated[Optional[str], typer.Option(help="Data set that replaces the test split.")]  # noqa: UP045
BatchSize = Annotated[int, typer.Option(help="Samples per step, over all devices together.")]
Workers = Annotated[int, typer.Option(help="Processes that decode image files.")]
Limit = Annotated[Optional[int], typer.Option(help="Use at most so many samples of each split.")]  # noqa: UP045
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
PrecisionOption = Annotated[
    Precision, typer.Option("--precision", help="Arithmetic of forward and backward.")
]
Seed = Annotated[int, typer.Option(help="Seed of every pseudo-random generator.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Refuse operations whose result depends on scheduling.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def data_options(
    data: str | None,
    val_data: str | None,
    test_data: str | None,
    batch_size: int,
    workers: int,
    limit: int | None,
) -> DataOptions:
    """Collect the data options of a command."""
    return DataOptions(data, val_data, test_data, batch_size, workers, limit)


def model_options(
    arch: str | None = None,
    arg: list[str] | None = None,
    input_shape: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    spec: str | None = None,
    trust_pickle: bool = False,
) -> ModelOptions:
    """Collect what the command line says about a network."""
    for item in arg or ():
        if "=" not in item:
            raise UsageError(f"--arg {item}: key=value is expected, as in num_classes=10")
    return ModelOptions(
        arch=arch,
        arguments=tuple(arg or ()),
        input_shape=parse_shape(input_shape) if input_shape else None,
        mean=parse_values(mean, "--mean") if mean else None,
        std=parse_values(std, "--std") if std else None,
        trust_pickle=trust_pickle,
        spec=spec,
    )


@dataclass(frozen=True)
class Invocation:
    """One call of a command: its console, its paths and what all commands are told.

    Attributes:
        verb: the command's name.
        source: INPUT as it was given.
        output: ``--output`` as it was given.
        user_code: further references on this command line that may name the user's functions.
    """

    verb: str
    console: Console
    source: str | None
    output: str | None = None
    force: bool = False
    allow_nonfinite: bool = False
    model: ModelOptions = field(default_factory=ModelOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    user_code: tuple[str | None, ...] = ()

    def write(
        self,
        operation: Callable[..., Any],
        options: Any,
        report: Callable[[Console, Any], None] | None = None,
        *,
        resumes: bool = False,
    ) -> None:
        """Run an operation that writes checkpoints; print the path of each.

        Args:
            operation: generator of outcomes.
            options: of its verb.
            report: says on stderr what a product's report holds.
            resumes: whether the command goes on with its own earlier run.
        """
        from cctool.operations import pipeline

        products = []
        with self.console.products_only():
            for product in pipeline.write(operation, options, self.request(resumes=resumes)):
                if report is not None:
                    report(self.console, product.report)
                self.console.path(product.path)
                products.append(product)
            self.console.document({"products": products})

    def read(self, operation: Callable[..., Any], options: Any) -> Any:
        """Run an operation that writes no checkpoint, and return its report."""
        from cctool.operations import pipeline

        with self.console.products_only():
            return pipeline.read(operation, options, self.request())

    def request(self, *, resumes: bool = False) -> Any:
        """Everything the pipeline must know, with ``-`` replaced by the path that stdin gives."""
        from cctool.operations.pipeline import Request

        return Request(
            verb=self.verb,
            source=None if self.source is None else resolved_source(self.source),
            output=self.output,
            force=self.force,
            allow_nonfinite=self.allow_nonfinite,
            model=self.model,
            runtime=self.runtime,
            user_code=tuple(reference for reference in self.user_code if reference),
            reporter=self.console,
            resumes=resumes,
        )


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, rather than at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def number(value: int | None) -> str:
    """Print a count, or that it is unknown."""
    return "unknown" if value is None else f"{value:,}"


def show_metrics(console: Console, before: Any, after: Any) -> None:
    """Say what was measured before and after, by split."""
    earlier = {metrics.split: metrics for metrics in before}
    for metrics in after:
        for name, value in metrics.values.items():
            old = earlier[metrics.split].values.get(name) if metrics.split in earlier else None
            change = f"{old:.4g} -> " if old is not None else ""
            console.note(f"{metrics.split} {name} {change}{value:.4g} (n={metrics.n:,})")


def resolved_source(source: str) -> str:
    """Give INPUT itself, or the path that stdin gives where INPUT is ``-``.

    Raises:
        UsageError: if stdin is a terminal.
        CctoolError: unless exactly one path comes from it.
    """
    if source != "-":
        return source
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("INPUT is -, which reads a path from stdin, but nothing is piped into this command")
    lines = [line.strip() for line in sys.stdin.read().splitlines() if line.strip()]
    if not lines:
        raise CctoolError("no path came from stdin: the command before this one failed, or wrote no file")
    if len(lines) > 1:
        raise CctoolError(f"{len(lines)} paths came from stdin, one is expected: {', '.join(lines)}")
    return lines[0]


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
        except KeyboardInterrupt:
            Console().error("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader of stdout went away; Python would complain once more when it flushes at exit.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - lives until the process ends
            raise typer.Exit(1) from None
        except OSError as error:
            # A full disk or a folder that may not be written to is nobody's fault here.
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
