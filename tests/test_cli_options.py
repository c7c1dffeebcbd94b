"""The command line is a contract: every command, argument and option is listed in cli_options.json.

After an intended change:  python tests/test_cli_options.py --write   (and a line in CHANGELOG.md)
"""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("cli_options.json")
REWRITE = "intended? then run `python tests/test_cli_options.py --write` and say so in CHANGELOG.md"


def command_tree(command: Any) -> dict[str, Any]:
    """Names of a command's arguments, options and subcommands."""
    tree: dict[str, Any] = {}
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            tree.setdefault("arguments", []).append(parameter.name)
        else:
            tree.setdefault("options", []).append("/".join([*parameter.opts, *parameter.secondary_opts]))
    if "options" in tree:
        tree["options"].sort()
    inside = getattr(command, "commands", {})
    if inside:
        tree["commands"] = {name: command_tree(inside[name]) for name in sorted(inside)}
    return tree


def current() -> str:
    """The command line as it is now, as the text of cli_options.json."""
    import typer.main

    from shardplan.cli import app

    return json.dumps(command_tree(typer.main.get_command(app)), indent=1) + "\n"


def test_command_line_is_pinned() -> None:
    listed = LIST.read_text(encoding="utf-8") if LIST.exists() else ""
    now = current()
    change = difflib.unified_diff(listed.splitlines(), now.splitlines(), "listed", "now", lineterm="")
    assert listed == now, "\n".join([*change, REWRITE])


def test_every_command_shows_an_example() -> None:
    import typer.main

    from shardplan.cli import app

    def leaves(command: Any, path: str) -> list[tuple[str, Any]]:
        inside = getattr(command, "commands", {})
        if not inside:
            return [(path, command)]
        return [leaf for name, sub in inside.items() for leaf in leaves(sub, f"{path} {name}")]

    found = leaves(typer.main.get_command(app), "shardplan")
    without = [path for path, command in found if "shardplan " not in f"{command.help} {command.epilog}"]
    assert not without, f"--help without an example: {', '.join(without)}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("use: python tests/test_cli_options.py --write")
    LIST.write_text(current(), encoding="utf-8")
    print(f"wrote {LIST}")
