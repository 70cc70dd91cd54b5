"""What shells are told when the user presses tab."""

from __future__ import annotations

import os
from collections.abc import Callable

import click
from click.shell_completion import CompletionItem, shell_complete

from calib.errors import CalibError

_SHELLS = ("bash", "zsh", "fish")

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completion_variable(name: str) -> str:
    """The environment variable by which shells ask the command ``name``."""
    return f"_{name}_COMPLETE".replace("-", "_").upper()


def complete(command: click.Command, name: str, instruction: str) -> int:
    """Prints the script for a shell (``bash_source``), or what could stand at the cursor.

    Raises:
        click.UsageError: for another instruction, or one that no shell has given.
    """
    variable = completion_variable(name)
    try:
        code = shell_complete(command, {}, name, variable, instruction)
    except (KeyError, ValueError) as error:
        raise click.UsageError(f"{variable}={instruction} is for shells: {error}") from error
    if code:
        known = ", ".join(f"{shell}_source" for shell in _SHELLS)
        raise click.UsageError(f"{variable} must be one of {known}, got {instruction!r}")
    return code


def one_of(*values: str) -> Completer:
    """Completes to one of ``values``."""

    def matching(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(value) for value in values if value.startswith(incomplete)]

    return matching


def method(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Completes to the name of a calibrator, plug-ins among them."""
    from calib.calibrators import names

    try:
        known = names()
    except CalibError:  # two plug-ins of one name: told when the command is run
        return []
    return one_of(*known)(context, parameter, incomplete)


def methods(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Completes the last of several calibrators with commas between them."""
    before, comma, last = incomplete.rpartition(",")
    return [
        CompletionItem(f"{before}{comma}{item.value}") for item in method(context, parameter, last)
    ]


def any_file(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes to a file or folder, by the shell itself."""
    return [CompletionItem(incomplete, type="file")]


def is_asked(name: str) -> str | None:
    """What a shell asks the command ``name`` for; None where it is called to work."""
    return os.environ.get(completion_variable(name)) or None
