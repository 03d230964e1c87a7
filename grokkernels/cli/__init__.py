"""The `grokkernels` command.

A subcommand is a file: `cli/NAME.py` defines `command`, a click command, and is found by its name. Such a file imports
what it needs inside the command's function, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import click

from ..training.errors import UserError
from ..version import __version__

# The order in which a newcomer meets them; further files follow by name.
_FIRST = ("doctor", "verify", "train", "generate", "compare", "plot")


class _Commands(click.Group):
    """Finds subcommands as files, and shows expected errors as one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = {m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")}
        return [name for name in _FIRST if name in names] + sorted(names - set(_FIRST))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return import_module(f"{__name__}.{cmd_name}").command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from None
        except BrokenPipeError:
            raise  # click ends quietly
        except OSError as error:
            if error.filename is None and error.strerror is None:
                raise
            where = f": {error.filename}" if error.filename is not None else ""
            raise click.ClickException(f"{error.strerror}{where}") from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="grokkernels")
def main() -> None:
    """Fast kernels for Grok-style transformers, and a small trainer that uses them.

    \b
    Try:
      grokkernels train                        learn the source text of Python's standard library
      grokkernels generate --prompt "def "     let the result speak
    """
