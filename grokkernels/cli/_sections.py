"""A click command whose `--help` lists the options under headings."""

from __future__ import annotations

from typing import Any

import click


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
