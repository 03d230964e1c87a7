"""A click command whose `--help` lists the options under headings, and what options of several commands share."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..training import device
from ..training.config import RANGES


class SectionedOption(click.Option):
    """An option that knows the heading it stands under."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        kwargs.setdefault("show_default", True)
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """Groups its options by section, in the order of their first appearance."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line is not None:
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(line)
        for title, lines in sections.items():
            with formatter.section(title):
                formatter.write_dl(lines)


def option(section: str, *names: str, **settings: Any) -> Any:
    """`click.option` with a heading."""
    return click.option(*names, cls=SectionedOption, section=section, **settings)


class Number(click.FloatRange):
    """A finite number in a range; click's own ranges let NaN and infinity through."""

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, parameter, ctx)
        if not abs(number) <= sys.float_info.max:
            self.fail(f"{value} is not a finite number.", parameter, ctx)
        return number


class DeviceName(click.ParamType):
    """What `--device` takes."""

    name = device.NAMES

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not device.is_name(value):
            self.fail(f"{value!r} is none of {device.NAMES}.", parameter, ctx)
        return value


def setting(name: str) -> click.ParamType:
    """The type of an option that is one of the numbers in `training.config.RANGES`."""
    allowed = RANGES[name]
    if allowed.kind is int:
        return click.IntRange(int(allowed.low), None if allowed.high >= 2**63 - 1 else int(allowed.high))
    high = None if allowed.high == sys.float_info.max else allowed.high
    return Number(allowed.low, high, min_open=allowed.above, max_open=allowed.below)


def threads_option(section: str) -> Any:
    """`--threads`."""
    return option(section, "--threads", type=setting("threads"), help="CPU threads.  [default: torch's choice]")


def device_option(section: str) -> Any:
    """`--device`."""
    return option(
        section,
        "--device",
        type=DeviceName(),
        default="auto",
        metavar="NAME",
        help="Where to compute: cpu, cuda, cuda:N, or auto, which is cuda where there is one with usable kernels.",
    )
