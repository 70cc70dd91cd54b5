"""The README's command reference is what ``--help`` says.

    python tests/test_reference.py --write

rewrites what stands between ``<!-- help: COMMAND -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
WIDTH = 100

_BLOCK = re.compile(r"(<!-- help: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def modules() -> dict[str, str]:
    """Of each console script, the module in ``cli`` that has its command."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg", "utf-8")
    lines = settings["options.entry_points"]["console_scripts"].split("\n")
    scripts = (line.split(" = ") for line in lines if line)
    return {name: value.split(":")[0].split(".")[-1] for name, value in scripts}


def reference(name: str, width: int = WIDTH) -> str:
    """What ``name --help`` prints, as a block of text for Markdown."""
    command: click.Command = import_module(f"cli.{modules()[name]}").command
    context = command.make_context(
        name, [], resilient_parsing=True, terminal_width=width, max_content_width=width
    )
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return "```text\n" + "\n".join(lines).rstrip() + "\n```\n"


def described(text: str) -> list[str]:
    """The commands that ``text`` has blocks for."""
    return [match.group(2) for match in _BLOCK.finditer(text)]


def rewritten(text: str) -> str:
    """``text`` with every block as it should be.

    Raises:
        ValueError: if a command has none.
    """
    missing = [f"<!-- help: {name} -->" for name in modules() if name not in described(text)]
    if missing:
        raise ValueError(f"add {', '.join(missing)}, each with <!-- end --> on a line below it")
    return _BLOCK.sub(lambda block: f"{block[1]}{reference(block[2])}{block[4]}", text)


@pytest.mark.parametrize("name", modules())
def test_the_readme_shows_the_help_of_every_command(name: str) -> None:
    text = README.read_text("utf-8")
    assert described(text).count(name) == 1, f"README.md needs one <!-- help: {name} -->"
    (shown,) = (block[3] for block in _BLOCK.finditer(text) if block[2] == name)
    assert shown == reference(name), "run: python tests/test_reference.py --write"


def test_the_readme_describes_no_command_that_is_not_installed() -> None:
    assert set(described(README.read_text("utf-8"))) <= set(modules())


def test_there_is_a_command_to_describe() -> None:
    assert "octav-calibrate" in modules()


@pytest.mark.parametrize("name", modules())
def test_the_reference_depends_on_no_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = reference(name)
    for columns in ("20", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        assert reference(name) == text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.startswith(f"```text\nUsage: {name} ")
    assert "--help" in text


def test_writing_changes_blocks_and_nothing_else() -> None:
    blocks = [f"<!-- help: {name} -->\nold\n<!-- end -->\n" for name in modules()]
    text = "# Title\n\n" + "between\n".join(blocks) + "\nbehind <!-- end -->\n"
    written = rewritten(text)
    assert rewritten(written) == written
    assert "old" not in written.splitlines()
    expected = [f"<!-- help: {n} -->\n{reference(n)}<!-- end -->\n" for n in modules()]
    assert written == "# Title\n\n" + "between\n".join(expected) + "\nbehind <!-- end -->\n"


def test_writing_asks_for_blocks_that_are_missing() -> None:
    with pytest.raises(ValueError, match=r"^add <!-- help: octav-calibrate -->"):
        rewritten("# Title\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    sys.path.insert(0, str(ROOT))
    try:
        README.write_text(rewritten(README.read_text("utf-8")), "utf-8")
    except ValueError as error:
        sys.exit(f"{README}: {error}")
