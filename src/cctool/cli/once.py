"""A command whose options with one value are given once: Typer would keep the last one silently."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand

from cctool.cli.console import Console

_REPEATED = "cctool.repeated"


class OnceCommand(TyperCommand):
    """Refuses options that are given several times, unless their value is a list; exit status 2.

    A flag counts as given again in its ``--no-`` form, too.
    """

    def make_parser(self, ctx: Any) -> Any:
        """The parser, which also notes in the context what it found more than once."""
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def counted(args: list[str]) -> Any:
            values, rest, order = parse(args=args)
            # One item for each time that an option stands on the command line.
            times = Counter(item for item in order if item.param_type_name == "option")
            ctx.meta[_REPEATED] = [
                f"{_shown(option)}: given {count} times; once is allowed"
                for option, count in times.items()
                if count > 1 and not (option.multiple or option.count or option.is_eager)
            ]
            return values, rest, order

        parser.parse_args = counted
        return parser

    def invoke(self, ctx: Any) -> Any:
        """Run the command unless an option was given too often."""
        if ctx.meta[_REPEATED]:
            Console().error("; ".join(ctx.meta[_REPEATED]))
            raise typer.Exit(2)
        return super().invoke(ctx)


def _shown(option: Any) -> str:
    return "/".join([option.opts[0], *option.secondary_opts[:1]])
