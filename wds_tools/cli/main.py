"""`wds-tools COMMAND ...`: find the command, make its config from the arguments, run it.

A command is a module beside this one (`convert` has one for all) with `Config` (a frozen dataclass, which is the command line),
`EXAMPLE` and `run(config) -> exit status`. It is imported only when it is called, so `wds-tools verify` starts without torch.
Exit status: 0 done, 1 failed or problems found, 2 wrong arguments, 128 + the signal that stopped it. Errors are one line on
stderr. Signals and streams are those of the process: see `wds_tools/__main__.py`.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from wds_tools.cli.options import help_of, parse
from wds_tools.errors import UsageError, WdsToolsError, meant
from wds_tools.plugins import CONVERTERS, plugins
from wds_tools.storage.base import check_writable
from wds_tools.terminal import say

COMMANDS = {
    ("inspect",): ("inspect", "show what an input is and what it would become; writes nothing"),
    ("convert", "pairs"): ("convert", "images with captions to shards: jsonl, img2dataset's tars, Parquet, folders"),
    ("convert", "documents"): ("convert", "texts to shards: DCLM, FineWeb, C4 and the like"),
    ("convert", "conversations"): ("convert", "conversations about images, and edits, to shards (LLaVA, MagicBrush)"),
    ("convert", "interleaved"): ("convert", "documents with images between their texts (OBELICS, MMC4) to shards"),
    ("convert", "coded"): ("convert", "rows with codes to shards: Liquid's, our exports, codes made elsewhere"),
    ("encode",): ("encode", "make the VQ codes of a dataset's images"),
    ("compare-codes",): ("compare_codes", "compare two encodings: equal codes, and the pictures they decode to"),
    ("vocabulary",): ("vocabulary", "add special tokens to a text tokenizer, and show the model size it needs"),
    ("relabel",): ("relabel", "put other texts (recaptions) and fields into samples, from tables"),
    ("select",): ("select", "choose samples of datasets: conditions, keys, duplicates, splits"),
    ("pack",): ("pack", "datasets to shards of token rows, ready to train on"),
    ("finalize",): ("finalize", "write the manifest of a dataset made in parts (--part)"),
    ("export", "hf"): ("export_hf", "shards to a Hugging Face dataset of Liquid's columns, shuffled"),
    ("export", "parquet"): ("export_parquet", "shards to typed Parquet with all content; convert coded reads it back"),
    ("verify",): ("verify", "check a dataset against its manifest"),
    ("stats",): ("stats", "lengths, codebook use, duplicates, drift: a table, or a page"),
    ("view",): ("view", "look at a dataset in a browser"),
    ("index",): ("index", "index the tars of a dataset, or third-party tars"),
    ("audit",): ("audit", "compare receipts of a training run with the manifests"),
    ("at",): ("at", "the samples of a step of a training run: texts, sources, pictures"),
    ("seen",): ("seen", "when a training run used a sample: epochs, steps, ranks"),
    ("doctor",): ("doctor", "show what is installed, the devices, and what can be read"),
    ("completion",): ("completion", "make a shell complete these commands"),
    ("simulate",): ("simulate", "estimate the cost of a training run, from the manifests alone"),
}


def main(argv: Sequence[str] | None = None, *, begin: Callable[[], None] = lambda: None, stops: Sequence[int] = ()) -> int:
    """Run a command line.

    Args:
        argv: the arguments behind the program's name; by default those of the process.
        begin: called when all is loaded and the arguments are right, before anything is done.
        stops: the signals behind a KeyboardInterrupt, since libraries raise one of their own in its place; none means SIGINT.

    Returns:
        The exit status.
    """
    args = [_at_home(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    known = commands() if args[:1] == ["convert"] else COMMANDS
    words = next((words for words in known if tuple(args[: len(words)]) == words), None)
    if words is None:
        return _no_command(args)
    config: Any = None
    try:
        for word in args:
            check_writable(word)
        module = load_command(words)
        command, rest = f"wds-tools {' '.join(words)}", args[len(words) :]
        if not {"-h", "--help"}.isdisjoint(rest):
            say(*help_of(module.Config, command, module.EXAMPLE))
            return 0
        try:
            config = parse(module.Config, rest)
        except UsageError as error:
            raise UsageError(f"{error} ({command} --help says more)") from error
        begin()
        status: int = module.run(config)
    except WdsToolsError as error:
        say(f"wds-tools: {' '.join(map(str.strip, str(error).splitlines()))}", error=True)  # a library may say more
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        number = signal.Signals(stops[0] if stops else signal.SIGINT)
        what = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
        can_resume = hasattr(config, "resume")
        how = "run again with --resume" if can_resume else "run the same command again"
        say(f"wds-tools: {what}; {how}", error=True)
        return 128 + number
    return status


def commands() -> dict[tuple[str, ...], tuple[str, str]]:
    """COMMANDS, and `convert NAME` for each converter of an installed package; a name of ours can't be taken."""
    others = {("convert", name): ("convert", "a converter of an installed package") for name in plugins(CONVERTERS)}
    return COMMANDS | others | COMMANDS


def load_command(words: tuple[str, ...]) -> Any:
    """The module of one of `commands`, or what stands for it. Raises WdsToolsError: see convert.command."""
    module = importlib.import_module(f"wds_tools.cli.{commands()[words][0]}")
    return module.command(words[1]) if words[0] == "convert" else module


def _at_home(arg: str) -> str:
    """An argument with `~/` at the beginning of its value as a shell gives it; none does so behind `--option=`."""
    match = re.fullmatch(r"(--[\w-]+=)?(~(?:/.*)?)", arg, re.DOTALL)
    return arg if match is None else (match[1] or "") + os.path.expanduser(match[2])  # noqa: PTH111 (of a URL or path as it stands)


def _no_command(args: list[str]) -> int:
    if args[:1] == ["--version"]:
        from wds_tools import __version__

        say(f"wds-tools {__version__}")
        return 0
    group = {words: about for words, about in commands().items() if len(words) > 1 and [words[0]] == args[:1]}
    known = group or commands()
    asked = not args or args[0] == "help" or not {"-h", "--help"}.isdisjoint(args)
    if asked or args == [next(iter(group), ("",))[0]]:
        name = f"{args[0]} KIND" if group else "COMMAND"
        lines = [f"usage: wds-tools {name} [options]     wds-tools {name} --help says more", ""]
        say(*lines, *(f"  {' '.join(words):<22} {summary}" for words, (_, summary) in known.items()), error=not asked)
        return 0 if asked else 2
    names = sorted(map(" ".join, known))
    said = " ".join(args[:2])
    close = meant(said, names, 0.85) or ("" if group else meant(args[0], names))
    say(f"wds-tools: unknown command {said!r}: {f'{close}The' if close else 'the'} commands are {', '.join(names)}", error=True)
    return 2
