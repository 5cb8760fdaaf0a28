"""Entry point: finds the subcommand, and turns errors into exit codes.

0 done, 2 bad input (one line on standard error), 1 the work itself failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from ..errors import HiddenKeyError
from .turns import say

COMMANDS = {
    "train": "fine-tune with LoRA and transformer-specific dropout",
    "eval": "evaluate the adapter of a finished run again",
    "bench": "time the library's parts beside what people use today",
    "sweep": "run a plan of experiments: methods x settings x tasks x seeds",
    "tokenize": "turn text into a token store that training maps into memory",
    "report": "what a sweep came to: a page of tables, tests and pictures",
    "masks": "show a mask as a picture, in the terminal or as a PNG",
    "doctor": "versions, instruction set, accelerator, and what a model's family supports",
    "demo": "plain LoRA against lora_dropout against HiddenKey on built-in data",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        say(f"hiddenkey: error: {message}; see {self.prog} --help", None)
        self.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it talks of kernels it lacks
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser("hiddenkey", description="Transformer-specific dropout for LoRA fine-tuning.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        if name in given[:1]:  # only the wanted command's module is imported: --help stays fast
            importlib.import_module(f".{name}", __package__).add_arguments(sub)
    try:
        options = parser.parse_args(given)
        if options.version:
            from importlib.metadata import version

            print(version("hiddenkey_rs"))
            return 0
        if options.command is None:
            parser.print_help()
            return 2
        return int(importlib.import_module(f".{options.command}", __package__).main(options))
    except HiddenKeyError as error:
        say(f"hiddenkey: error: {' '.join(str(error).split())}", error)
        return error.exit_code
    except KeyboardInterrupt as error:
        say("hiddenkey: interrupted", error)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:  # not of a file that anybody named
            raise
        say(f"hiddenkey: error: {error.strerror} (got {str(error.filename)!r}); check the path, rights and room", error)
        return 2
    except SystemExit as stop:
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
