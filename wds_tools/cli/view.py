"""`wds-tools view`."""

from __future__ import annotations

import signal
import threading
import webbrowser
from dataclasses import dataclass

from wds_tools.cli.options import Positional
from wds_tools.terminal import say
from wds_tools.view.server import ViewConfig, ViewServer

EXAMPLE = "wds-tools view s3://bucket/pairs --open"


@dataclass(frozen=True, kw_only=True)
class Config(ViewConfig):
    """Look at a dataset in a browser: its samples, the pictures that codes decode to, its rejects, its statistics. Ctrl-C ends
    it."""

    input: Positional[str]
    """The dataset: a directory or URL."""
    open: bool = False
    """Open the page in this machine's browser."""


def run(config: Config) -> int:
    """Serve the page until Ctrl-C."""
    server = ViewServer(config)
    say(f"view: {config.input} at {server.url} (Ctrl-C ends)")
    if config.open:
        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt as stop:
        number = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
        if number == signal.SIGINT:
            say("")
            return 0
        say(f"wds-tools: stopped by {number.name}", error=True)
        return 128 + number
    finally:
        server.server_close()
    return 0
