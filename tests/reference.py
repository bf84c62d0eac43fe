"""The reference of commands in the README: `make reference` writes it anew from the table that the
parser is made of, and test_readme.py tells where they differ."""
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- made by make reference -->\n", "<!-- until here -->\n"


def reference(commands, groups):
    """The text between the markers; a group is headed before its first command."""
    everywhere = set.intersection(*({option[0] for option in command.options}
                                    for command in commands))
    text = "Options of all commands, before or behind the name:\n\n"
    text += "".join(option_line(option) for option in commands[0].options
                    if option[0] in everywhere)
    for command in commands:
        if command.name in groups:
            text += f"\n### {groups[command.name]}\n"
        line = f"roexec {command.name} {command.usage}".rstrip()
        text += f"\n**`{line}`** - {command.help}; for example `roexec {command.example}`\n"
        own = [option for option in command.options if option[0] not in everywhere]
        text += "\n" * bool(own) + "".join(map(option_line, own))
    return text


def option_line(option):
    flags, metavar, what, _ = option
    value = f" {metavar.rstrip('.')}" if metavar else ""
    return f"- `{', '.join(flags.split())}{value}`: {what}\n"


def split(text):
    """What stands before the reference, the reference, what stands behind."""
    before, _, rest = text.partition(BEGIN)
    between, found, behind = rest.partition(END)
    assert found, f"{README} has lost its markers"
    return before + BEGIN, between, END + behind


if __name__ == "__main__":
    sys.path.insert(0, str(README.parent))
    import roexec
    first, _, last = split(README.read_text(encoding="utf-8"))
    README.write_text(first + reference(roexec.commands(), roexec.COMMAND_GROUPS) + last, encoding="utf-8")
