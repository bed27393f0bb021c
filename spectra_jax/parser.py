"""A command line of `spectra`, read and refused: what its commands take stands in arguments.py."""

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from spectra_jax.arguments import analysing, changing_models, looking_at_runs, making_models, using_models
from spectra_jax.errors import UserError

CONFIG_PREFIX = "--config."


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """One command line: `command`, its options, and as `overrides` what follows `--config.`.

    Raises:
      UserError: an unknown argument (the message names the nearest), or a missing one.
    """
    parser, commands = _parser()
    if arguments and not arguments[0].startswith("-"):
        _check_names(arguments, commands)
    args, rest = parser.parse_known_args(arguments)
    overrides = [text.removeprefix(CONFIG_PREFIX) for text in rest if text.startswith(CONFIG_PREFIX)]
    unknown = [text for text in rest if not text.startswith(CONFIG_PREFIX)]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; see spectra {args.command} --help")
    args.overrides = overrides
    return args


def _check_names(arguments: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Refuses a misspelt command or option, before argparse complains of what is missing because of it."""
    command, *rest = arguments
    if command not in commands:
        near = difflib.get_close_matches(command, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}"
        raise UserError(f"unknown command {command!r}; {hint}")
    options = list(commands[command]._option_string_actions)
    for text in rest:
        name, equals, _ = text.partition("=")
        if name.startswith(CONFIG_PREFIX) and commands[command].get_default("takes_config"):
            if not equals:
                raise UserError(f"{name} has no value; write {name}=VALUE")
        elif name.startswith("--") and " " not in name and name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see spectra {command} --help"
            raise UserError(f"unknown argument {text!r}; {hint}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage of a whole command."""
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands."""
    top = _Parser(
        prog="spectra", description="Pretrain, evaluate and compare language models whose bit-width is a config value."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, epilog: str = "", takes_config: bool = False) -> Callable:
        parser = commands.add_parser(
            name, help=help, description=help, epilog=epilog, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(takes_config=takes_config)
        return parser.add_argument

    for declare in (making_models, changing_models, using_models, looking_at_runs, analysing):
        declare(add)
    return top, commands.choices
