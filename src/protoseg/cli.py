"""Flags to one verb. torch is imported inside the verb: `--help` must not wait for it.

A setting comes from the defaults in `config`, then from each `--config FILE` in the order given, then from the options,
read from left to right: options before a `--config` are overridden by it. A section of a YAML may name a file,
`data: parts/camvid.yaml`, relative to the YAML it stands in.

A YAML is data. jsonargparse by itself imports any module a value names, and expands aliases without bound; both are off
here (`checked_load`, `import_path_denylist`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import jsonargparse
import yaml

from protoseg import __version__
from protoseg.config import Data, DataError, Evaluation, Head, Model, Optim, Recipe, UserError

LARGEST_CONFIG = 1_000_000  # characters
FAILED, USAGE, DATA_REFUSED, INTERRUPTED = 1, 2, 3, 130


class Parser(jsonargparse.ArgumentParser):
    """Says what is wrong in one line and where to read more, instead of the list of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        verb = getattr(ex, "subcommand_parser", None) or self
        # a hint of the library's own, and the list of all options of the verb that was meant
        message = re.sub(r"tip: For details.*|\n*\s*Run with JSONARGPARSE_DEBUG.*", "", message)
        print(f"protoseg: error: {one_line(message)} (see {_command(verb.prog)} --help)", file=sys.stderr)
        sys.exit(USAGE)


def _command(prog: str) -> str:
    return prog.replace(" [options]", "")


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one verb and exit: 0 done, 1 failed, 2 wrong usage, 3 data refused, 130 interrupted, 143 terminated."""
    code = 0
    verb, given = parse(sys.argv[1:] if argv is None else argv)
    try:
        verb(given)
    except DataError as error:
        print(f"protoseg: error: {one_line(error)}", file=sys.stderr)
        code = DATA_REFUSED
    except UserError as error:
        print(f"protoseg: error: {one_line(error)}", file=sys.stderr)
        code = FAILED
    except KeyboardInterrupt:
        print("protoseg: interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def parse(argv: list[str]) -> tuple[Callable[[Any], Any], Any]:
    """The verb's function and its settings, checked and typed. Exits with 2 where they are wrong."""
    guard()
    parser = build_parser()
    if not argv:
        parser.print_help()
        sys.exit(USAGE)
    try:
        # a denied import escapes as ImportError, too deep a YAML as RecursionError
        given = parser.parse_args(argv)
        given = parser.instantiate(given)
    except (ImportError, RecursionError) as error:
        parser.error(str(error))
    name, settings = given.verb, given[given.verb]
    verb = next(verb for verb in VERBS if name in (verb.name, *verb.aliases))
    if verb.parts:
        part = next(part for part in verb.parts if part.name == settings.part)
        return part.run, settings[settings.part]
    return verb.run, settings


def guard() -> None:
    """Make configs data: nothing is imported because a value names it, nothing is expanded without bound."""
    jsonargparse.set_parsing_settings(import_path_denylist=["*"])
    jsonargparse.set_loader("yaml", checked_load, exceptions=(yaml.YAMLError,))


def checked_load(text: str, **options: Any) -> Any:
    """jsonargparse's YAML loader for text of bounded size and without aliases.

    Raises:
        yaml.YAMLError: otherwise.
    """
    if len(text) > LARGEST_CONFIG:
        raise yaml.YAMLError(f"the config has {len(text)} characters; at most {LARGEST_CONFIG} are read")
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise yaml.YAMLError("YAML aliases (*name) are not allowed; write the value out")
    return _load(text, **options)


_load = jsonargparse.get_loader("yaml")


def build_parser() -> Parser:
    """All verbs with their options; imports no task."""
    parser = Parser(prog="protoseg", description="Semantic segmentation with non-learnable prototypes.")
    parser.add_argument("--version", action="version", version=f"protoseg {__version__}")
    verbs = parser.add_subcommands(required=True, dest="verb", title="verbs", metavar="VERB")
    for verb in VERBS:
        verbs.add_subcommand(verb.name, _parser_of(verb), help=verb.help, aliases=list(verb.aliases))
    for verb in VERBS:
        if verb.parts:
            parts = verbs.choices[verb.name].add_subcommands(required=True, dest="part", title="parts", metavar="PART")
            for part in verb.parts:
                parts.add_subcommand(part.name, _parser_of(part), help=part.help)
    return parser


def _parser_of(verb: Verb) -> Parser:
    parser = Parser(description=verb.description or verb.help)
    if verb.options:
        verb.options(parser)
    if verb.usage:
        parser.usage = verb.usage
    return parser


def recipe_options(parser: Parser, shown: tuple[str, ...] = ()) -> None:
    """Every field of `Recipe` as an option; where `shown` names sections, `--help` leaves out the others.

    Verbs that need only a section take whole recipes too, so that one file serves them all.
    """
    parser.add_argument("--config", action="config", help="a YAML of settings; several are applied in order")
    parser.add_class_arguments(Recipe, None)
    helps = argument_help(Recipe)
    for section in (Data, Model, Head, Optim, Evaluation):
        prefix = section.__name__.lower()
        helps |= {f"{prefix}.{name}": text for name, text in argument_help(section).items()}
    for action in parser._actions:
        if shown and action.dest.split(".")[0] not in (*shown, "config", "help", "print_config"):
            action.help = jsonargparse.SUPPRESS
        elif action.dest in helps:
            action.help = helps[action.dest]
    for group in parser._action_groups:
        found = re.search(r"protoseg\.config\.(\w+)", group.title or "")
        if found:
            group.title = "the run" if found[1] == "Recipe" else found[1].lower()


def argument_help(documented: type) -> dict[str, str]:
    """Field -> its text in the `Args:` section of a docstring; `a, b: text` describes both."""
    lines = (documented.__doc__ or "").split("Args:\n")[-1].splitlines()
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        entry = re.fullmatch(r" {8}([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.startswith(" " * 12):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return {name: text.replace("%", "%%").replace("`", "") for name, text in found.items()}


def recipe_of(settings: Any) -> Recipe:
    """The `Recipe` of a verb with `recipe_options`."""
    return Recipe(**{name: settings[name] for name in Recipe.__dataclass_fields__})


def train(settings: Any) -> None:
    from protoseg.tasks.training import train

    train(recipe_of(settings))


def info_options(parser: Parser) -> None:
    parser.add_argument(
        "folder", type=str, nargs="?", default="", help="a run or model folder; none: what is installed"
    )
    parser.add_argument("--recipes", type=str, default="recipes", help="folder of recipes (default: recipes)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def info(settings: Any) -> None:
    from protoseg.tasks.info import info

    info(settings.folder, recipes=settings.recipes, as_json=settings.json)


@dataclass(frozen=True)
class Verb:
    """One word of the command line.

    Args:
        name, aliases: what is typed.
        help: one line in the list of verbs.
        options: adds the verb's options to its parser.
        run: called with the parsed settings.
        parts: second words, as in `data check`.
        usage: shown in place of the list of all options.
        description: shown above the options.
    """

    name: str
    help: str
    options: Callable[[Parser], None] | None = None
    run: Callable[[Any], Any] = print
    aliases: tuple[str, ...] = ()
    parts: tuple[Verb, ...] = ()
    usage: str | None = None
    description: str | None = None


VERBS = (
    Verb(
        "train",
        "train a segmenter, or continue to",
        recipe_options,
        train,
        usage="protoseg train [--config FILE] [--print_config] [--steps N] [--data.name NAME] [--SETTING VALUE ...]",
    ),
    Verb("info", "what is installed, or what a run or model folder holds", info_options, info),
)
