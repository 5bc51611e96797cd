"""`wds-tools completion`: a script for the shell that completes commands, options and what an option may be.

The script is made once from the commands' configs and holds all it needs: pressing Tab starts no Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wds_tools.cli import main
from wds_tools.cli.options import Positional, options_of
from wds_tools.terminal import say

EXAMPLE = "wds-tools completion bash > ~/.local/share/bash-completion/completions/wds-tools"
_Options = Mapping[str, tuple[str, ...]]
"""Option -> the words that it may be followed by, none if anything may; under "" those that may stand without an option."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Print a script that makes a shell complete `wds-tools` commands. Without a file: `source <(wds-tools completion bash)`."""

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """Which shell it is for."""


def run(config: Config) -> int:
    """Print the script."""
    commands = {" ".join(words): _options(main.load_command(words).Config) for words in main.commands()}
    match config.shell:
        case "bash":
            say(*_BASH.format(**_bash(commands)).splitlines())
        case "zsh":
            say(
                "#compdef wds-tools", "autoload -U +X bashcompinit && bashcompinit", *_BASH.format(**_bash(commands)).splitlines()
            )
        case "fish":
            say(*_fish(commands))
    return 0


def _options(config: Any) -> _Options:
    found: dict[str, tuple[str, ...]] = {"--help": ()}
    for option in options_of(config):
        found["" if option.is_positional else option.flag] = tuple(option.known() if option.known else option.choices)
    return found


_BASH = """_wds_tools() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} choices= flags=
    local said=" ${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}} "
    if [ "$COMP_CWORD" -eq 1 ]; then
        choices="{first}" flags="--help --version"
    else
        case "$said" in
{options}
{second}
        esac
        case "$said$prev" in
{values}
        esac
    fi
    case "$cur" in -*) choices=$flags ;; esac
    COMPREPLY=($(compgen -W "$choices" -- "$cur"))
}}
complete -o default -F _wds_tools wds-tools"""


def _bash(commands: Mapping[str, _Options]) -> dict[str, str]:
    seconds: dict[str, list[str]] = {}
    options, values = [], []
    for command, known in commands.items():
        first, _, second = command.partition(" ")
        if second:
            seconds.setdefault(first, []).append(second)
        names = " ".join(filter(None, known))
        options.append(f'            " {command} "*) flags="{names}" choices="{" ".join(known.get("", ()))}" ;;')
        values += [
            f'            " {command} "*{option}) choices="{" ".join(choices)}" ;;'
            for option, choices in known.items()
            if option and choices
        ]
    return {
        "first": " ".join(dict.fromkeys(command.partition(" ")[0] for command in commands)),
        "options": "\n".join(options),
        "second": "\n".join(f'            " {first} "*) choices="{" ".join(names)}" ;;' for first, names in seconds.items()),
        "values": "\n".join(values),
    }


def _fish(commands: Mapping[str, _Options]) -> list[str]:
    lines = [
        "complete -c wds-tools -n __fish_use_subcommand -l version",
        "complete -c wds-tools -n __fish_use_subcommand -l help",
    ]
    for words, (_, summary) in main.commands().items():
        first, *second = words
        said = f'"__fish_seen_subcommand_from {first}"'
        lines.append(
            f"complete -c wds-tools -f -n __fish_use_subcommand -a {first}" + ("" if second else f" -d '{_quoted(summary)}'")
        )
        for name in second:
            not_yet = f'"__fish_seen_subcommand_from {first}; and test (count (commandline -opc)) -eq 2"'
            lines.append(f"complete -c wds-tools -f -n {not_yet} -a {name} -d '{_quoted(summary)}'")
            said = f'"__fish_seen_subcommand_from {first}; and __fish_seen_subcommand_from {name}"'
        for option, choices in commands[" ".join(words)].items():
            may_be = f" -a '{' '.join(choices)}'" if choices else ""
            if option:
                lines.append(f"complete -c wds-tools -n {said} -l {option[2:]}" + (f" -x{may_be}" if choices else ""))
            elif choices:
                lines.append(f"complete -c wds-tools -f -n {said}{may_be}")
    return list(dict.fromkeys(lines))


def _quoted(text: str) -> str:
    return text.replace("'", "\\'")
