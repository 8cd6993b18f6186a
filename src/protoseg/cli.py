"""Flags to one verb. torch is imported inside the verb: `--help` must not wait for it.

A setting comes from the defaults in `config`, then from each `--config FILE` in the order given, then from the options,
read from left to right: options before a `--config` are overridden by it. A section of a YAML may name a file,
`data: parts/camvid.yaml`, relative to the YAML it stands in.

A YAML is data. jsonargparse by itself imports any module a value names, and expands aliases without bound; both are off
here (`checked_load`, `import_path_denylist`).
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml

from protoseg import __version__
from protoseg.config import Data, DataError, Evaluation, Head, Model, Optim, Recipe, Study, UserError

LARGEST_CONFIG = 1_000_000  # characters
DEEPEST_CONFIG = 50  # levels of nesting; a recipe has 3
OPENING = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken,
)  # fmt: skip
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
FAILED, USAGE, DATA_REFUSED, INTERRUPTED, UNREAD = 1, 2, 3, 130, 141
SECTIONS = (Data, Model, Head, Optim, Evaluation)


class Parser(jsonargparse.ArgumentParser):
    """Says what is wrong in one line and where to read more, instead of the list of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        prog = (getattr(ex, "subcommand_parser", None) or self).prog
        if missing := re.search(r"arguments are required: (\w+)\.(.+)", message):  # told by the parser of all verbs
            prog, message = f"protoseg {missing[1]}", f"not given: {missing[2]}"
        # a hint of the library's own, and the list of all options of the verb that was meant
        message = re.sub(r"tip: For details.*|\n*\s*Run with JSONARGPARSE_DEBUG.*", "", message)
        print(f"protoseg: error: {one_line(message)} (see {_command(prog)} --help)", file=sys.stderr)
        sys.exit(USAGE)


def _command(prog: str) -> str:
    return prog.replace(" [options]", "")


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one verb and exit: 0 done, 1 failed, 2 wrong usage, 3 data refused, 130 interrupted, 141 output not read to
    its end (`| head`), 143 terminated.
    """
    try:
        verb, given = parse(sys.argv[1:] if argv is None else argv)
        code = verb(given) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        code = UNREAD
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


def _reader_left() -> bool:
    """Whether nobody reads stdout any more; then what is still to be written is dropped, by Python's last flush too."""
    try:
        stdout = select.poll()
        stdout.register(sys.stdout.fileno(), 0)
        left = any(event & select.POLLERR for _, event in stdout.poll(0))
    except (AttributeError, OSError):  # a system without poll, a stdout that is no file
        return False
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def parse(argv: list[str]) -> tuple[Callable[[Any], int | None], Any]:
    """The verb's function and its settings, checked and typed. Exits with 2 where they are wrong."""
    guard()
    parser = build_parser()
    if not argv:
        parser.print_help()
        sys.exit(USAGE)
    try:
        # a denied import escapes as ImportError, too deep a YAML as RecursionError
        given = parser.parse_args(argv)
        verb = next(verb for verb in VERBS if given.verb in (verb.name, *verb.aliases))
        if verb.kept_config and (kept := verb.kept_config(given[given.verb])):
            given = parser.parse_args([argv[0], "--config", kept, *argv[1:]])
        known = recorded(given[given.verb].model, verb.from_run) if verb.from_run else {}
        if known:
            options = [f"--{section}={json.dumps(values)}" for section, values in known.items()]
            given = parser.parse_args([argv[0], *options, *argv[1:]])
        given = parser.instantiate(given)
    except (ImportError, RecursionError) as error:
        parser.error(str(error))
    settings = given[given.verb]
    settings.typed = given.verb
    for section in verb.from_run:
        if section not in known and not any(word.startswith(f"--{section}") for word in argv):
            settings[section] = None  # not the defaults: the task says what is missing, or decides
    if verb.parts:
        part = next(part for part in verb.parts if part.name == settings.part)
        return part.run, settings[settings.part]
    return verb.run, settings


def guard() -> None:
    """Make configs data: nothing is imported because a value names it, nothing is expanded without bound."""
    jsonargparse.set_parsing_settings(import_path_denylist=["*"])
    jsonargparse.set_loader("yaml", checked_load, exceptions=(yaml.YAMLError,))


def checked_load(text: str, **options: Any) -> Any:
    """jsonargparse's YAML loader for text of bounded size and depth and without aliases.

    Raises:
        yaml.YAMLError: otherwise.
    """
    if len(text) > LARGEST_CONFIG:
        raise yaml.YAMLError(f"the config has {len(text)} characters; at most {LARGEST_CONFIG} are read")
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise yaml.YAMLError("YAML aliases (*name) are not allowed; write the value out")
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > DEEPEST_CONFIG:
            raise yaml.YAMLError(f"the config is nested deeper than {DEEPEST_CONFIG} levels")
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
    explain(parser, {**argument_help(Recipe), **section_help(*SECTIONS)})
    for action in parser._actions:
        if shown and action.dest.split(".")[0] not in (*shown, "config", "help", "print_config"):
            action.help = jsonargparse.SUPPRESS


def section_options(parser: Parser, *sections: type) -> None:
    """Sections of `Recipe` as options, `--data.name` and so on."""
    for section in sections:
        parser.add_class_arguments(section, section.__name__.lower())
    explain(parser, section_help(*sections))


def section_help(*sections: type) -> dict[str, str]:
    """Option -> its text, `data.root` and so on; for `data` itself what can be given there."""
    helps: dict[str, str] = {}
    for section in sections:
        prefix = section.__name__.lower()
        helps[prefix] = f"a YAML of the {prefix} settings below"
        helps |= {f"{prefix}.{name}": text for name, text in argument_help(section).items()}
    return helps


def explain(parser: Parser, helps: dict[str, str]) -> None:
    """Give the options that are settings the text of their docstrings; the verb's own options keep theirs."""
    for action in parser._actions:
        action.help = helps.get(action.dest, action.help)
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


def _json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def train(settings: Any) -> None:
    from protoseg.tasks.training import train

    train(recipe_of(settings))


def data_options(parser: Parser) -> None:
    recipe_options(parser, shown=("data",))
    _json(parser)


def data_check(settings: Any) -> int:
    from protoseg.tasks.audit import check

    return check(settings.data, json=settings.json)


def stats_options(parser: Parser) -> None:
    parser.add_argument("--split", type=str, default="train", help="which split to count (default: train)")
    data_options(parser)


def data_stats(settings: Any) -> int:
    from protoseg.tasks.audit import stats

    return stats(settings.data, settings.split, json=settings.json)


def evaluate_options(parser: Parser) -> None:
    parser.add_argument("model", type=str, help="a run folder (its final model), or a model folder such as runs/a/best")
    parser.add_argument("--split", type=str, default="", help="train, val or test (default: test; of `val`: val)")
    parser.add_argument("--prefix", type=str, default="", help="only images whose names begin so")
    parser.add_argument("--out", type=str, default="", help="the JSON file; empty: in the model's folder")
    _device(parser)
    _json(parser)
    section_options(parser, Data, Evaluation)


def evaluate(settings: Any) -> None:
    from protoseg.tasks.evaluation import evaluate

    split = settings.split or ("val" if settings.typed == "val" else "test")
    names = ("data", "evaluation", "prefix", "out", "json", "device")
    evaluate(settings.model, split=split, **{name: settings[name] for name in names})


def predict_options(parser: Parser) -> None:
    parser.add_argument("model", type=str, help="a run folder (its final model), or a model folder such as runs/a/best")
    parser.add_argument("images", type=str, nargs="+", help="images, folders and globs")
    parser.add_argument("--out", type=str, default="predictions", help="folder to write to")
    parser.add_argument("--overlay", type=bool, default=True, help="also write the image under its labels")
    parser.add_argument("--confidence", action="store_true", help="also write the probability of the chosen class")
    parser.add_argument(
        "--void_below", type=float, default=0.0, help="write pixels of a less probable class as void (255)"
    )
    parser.add_argument(
        "--keep_surest", type=float, default=1.0, help="write all but this surest share of each class's pixels as void"
    )
    parser.add_argument(
        "--submission_format",
        type=Literal["", "ade20k", "cityscapes"],
        default="",
        help="the ids a benchmark server wants",
    )
    parser.add_argument("--overwrite", action="store_true", help="do again what is there already")
    parser.add_argument("--exif", action="store_true", help="turn images upright as their EXIF orientation says")
    parser.add_argument(
        "--max_pixels", type=int, default=Data.max_pixels, help="refuse to decode larger images (decompression bombs)"
    )
    _device(parser)
    section_options(parser, Evaluation)


def predict(settings: Any) -> int:
    from protoseg.tasks.prediction import predict

    names = [
        *("out", "overlay", "confidence", "evaluation", "void_below", "keep_surest"),
        *("submission_format", "overwrite", "exif", "max_pixels", "device"),
    ]
    return predict(settings.model, settings.images, **{name: settings[name] for name in names}).exit_code


def _device(parser: Parser) -> None:
    parser.add_argument("--device", type=Literal["auto", "cpu", "gpu"], default="auto", help="auto takes a GPU if any")


def recorded(model: str, sections: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Settings of the run a model lies in, by section; empty where it lies in none.

    Raises:
        UserError: the run's `config.yaml` is not a mapping.
    """
    folder = Path(model).absolute()
    # a model folder lies in its run; a run folder holds the file itself
    places = [folder.parent] if (folder / "model.safetensors").is_file() else [folder]
    path = next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)
    if path is None:
        return {}
    try:
        settings = checked_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as fault:
        raise UserError(f"{path}: cannot be read ({fault}); it is written by protoseg train") from fault
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not a mapping of settings; it is written by protoseg train")
    return {name: settings[name] for name in sections if isinstance(settings.get(name), dict)}


def study_options(parser: Parser) -> None:
    parser.add_argument("name", type=str, help="the study's folder below --runs, such as heads")
    parser.add_argument("--config", action="config", help="the study's YAML; none: the one kept in its folder")
    parser.add_class_arguments(Study, None)
    add = parser.add_argument
    add("--set", type=str, nargs="+", default=[], help="settings of all runs, such as data.root=CAMVID")
    add("--runs", type=str, default="runs", help="the folder of all runs (default: runs)")
    add("--workers", type=int, default=1, help="runs at the same time, each a process (default: 1)")
    add("--threads", type=int, default=0, help="CPU threads of a run; 0: OMP_NUM_THREADS, else CPUs / workers")
    add("--devices", type=str, default="", help="GPUs that runs take in turn, such as 0,1")
    add("--only", type=str, nargs="+", default=[], help="run only these variants")
    add("--dry-run", action="store_true", help="print the runs and how far they are")
    add("--report-only", action="store_true", help="run nothing, write the report")
    explain(parser, argument_help(Study))


def study_folder(settings: Any) -> Path:
    if not re.fullmatch(r"\w[\w.-]*", settings.name):
        raise UserError(f"{settings.name!r} is no name of a study; use letters, digits and . _ - (the folder: --runs)")
    return Path(settings.runs) / settings.name


def kept_study(settings: Any) -> str:
    path = study_folder(settings) / "study.yaml"
    return str(path) if not settings.config and not settings.recipe and path.is_file() else ""


def study(settings: Any) -> int:
    from protoseg.tasks.study import study

    plan, build = study_plan(settings)
    return study(
        study_folder(settings),
        plan,
        build,
        devices=[word for word in settings.devices.split(",") if word],
        **{name: settings[name] for name in ("workers", "threads", "only", "dry_run", "report_only")},
    )


def study_plan(settings: Any) -> tuple[Study, Callable[[dict[str, Any]], Recipe]]:
    """The study, and a function from dotted settings to its recipe with them.

    Raises:
        UserError: no study, no recipe, or a setting that cannot be read.
    """
    plan = Study(**{name: settings[name] for name in Study.__dataclass_fields__})
    if not plan.recipe:
        raise UserError(f"{study_folder(settings)} holds no study yet; give one with --config studies/NAME.yaml")
    homes = [Path(str(path)).parent for path in settings.config or []]
    recipe = next((home / plan.recipe for home in homes if (home / plan.recipe).is_file()), Path(plan.recipe))
    plan = replace(plan, overrides={**plan.overrides, **dict(map(assignment, settings.set))})
    return plan, varied(recipe)


def assignment(word: str) -> tuple[str, Any]:
    """ "head.momentum=0.9" -> ("head.momentum", 0.9); the value is YAML."""
    name, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"--set {word}: expected NAME=VALUE, such as data.root=CAMVID")
    try:
        return name, checked_load(value)
    except yaml.YAMLError as fault:
        raise UserError(f"--set {word}: the value is not YAML ({one_line(fault)})") from fault


def varied(recipe: Path) -> Callable[[dict[str, Any]], Recipe]:
    """A function from dotted settings to the recipe with them.

    Raises:
        UserError: here or in that function: no such file, a setting that does not exist, a value it cannot have.
    """
    if not recipe.is_file():
        raise UserError(f"{recipe}: no such recipe; `recipe` of a study is a path beside its own YAML")
    guard()
    parser = Refusing()
    recipe_options(parser)
    base = parser.parse_path(str(recipe))

    def build(settings: dict[str, Any]) -> Recipe:
        nested: dict[str, Any] = {}
        for name, value in settings.items():
            *sections, last = name.split(".")
            level = nested
            for section in sections:
                level = level.setdefault(section, {})
            level[last] = value
        return recipe_of(parser.instantiate(parser.parse_object(nested, namespace=base.clone())))

    return build


class Refusing(Parser):
    """Raises instead of exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(one_line(re.sub(r"tip: For details.*|\n*\s*Run with JSONARGPARSE_DEBUG.*", "", message)))


def demo_options(parser: Parser) -> None:
    parser.add_argument("--out", type=str, default="demo", help="folder to write to")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of each network")
    parser.add_argument("--seed", type=int, default=0, help="of both trainings")
    parser.add_argument("--num_prototypes", type=int, default=5, help="per class")
    parser.add_argument("--accelerator", type=Literal["auto", "cpu", "gpu"], default="auto", help="auto, cpu or gpu")


def demo(settings: Any) -> None:
    from protoseg.tasks.demo import demo

    demo(
        settings.out,
        steps=settings.steps,
        seed=settings.seed,
        num_prototypes=settings.num_prototypes,
        accelerator=settings.accelerator,
    )


def info_options(parser: Parser) -> None:
    parser.add_argument(
        "folder", type=str, nargs="?", default="", help="a run or model folder; none: what is installed"
    )
    parser.add_argument("--recipes", type=str, default="recipes", help="folder of recipes (default: recipes)")
    _json(parser)


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
        run: called with the parsed settings; what it returns is the exit code, None meaning 0.
        parts: second words, as in `data check`.
        from_run: sections that are taken from the run of `model` where the user does not give them.
        kept_config: the YAML that stands in where the user gives no `--config`; empty: none.
        usage: shown in place of the list of all options.
        description: shown above the options.
    """

    name: str
    help: str
    options: Callable[[Parser], None] | None = None
    run: Callable[[Any], int | None] = lambda _: None
    aliases: tuple[str, ...] = ()
    parts: tuple[Verb, ...] = ()
    from_run: tuple[str, ...] = ()
    kept_config: Callable[[Any], str] | None = None
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
    Verb(
        "evaluate",
        "measure a model on a split",
        evaluate_options,
        evaluate,
        aliases=("eval", "val", "test"),
        from_run=("data", "evaluation"),
        usage="protoseg evaluate MODEL [--split SPLIT] [--json] [--data.* VALUE ...] [--evaluation.* VALUE ...]",
        description="Measure a model on a split. Data and evaluation settings are those of its run unless given.",
    ),
    Verb(
        "predict",
        "segment images, folders of images or globs",
        predict_options,
        predict,
        from_run=("evaluation",),
        usage="protoseg predict MODEL IMAGES [IMAGES ...] [--out FOLDER] [--evaluation.* VALUE ...]",
    ),
    Verb(
        "data",
        "check a data set, count its classes",
        usage="protoseg data PART ...",
        parts=(
            Verb(
                "check",
                "open every pair and list all faults with the fix",
                data_options,
                data_check,
                usage="protoseg data check [--config FILE] [--data.name NAME] [--data.root DIR] [--data.* VALUE ...]",
            ),
            Verb(
                "stats",
                "class frequencies, loss weights, pixel mean and deviation",
                stats_options,
                data_stats,
                usage="protoseg data stats [--split SPLIT] [--config FILE] [--data.name NAME] [--data.* VALUE ...]",
            ),
        ),
    ),
    Verb(
        "study",
        "train variants of a recipe with the same seeds and compare them",
        study_options,
        study,
        kept_config=kept_study,
        usage="protoseg study NAME [--config FILE] [--set SETTING=VALUE ...] [--workers N] [--devices 0,1] "
        "[--only VARIANT ...] [--dry-run] [--report-only]",
    ),
    Verb(
        "demo",
        "train softmax and prototypes on generated scenes and compare them",
        demo_options,
        demo,
        usage="protoseg demo [--out FOLDER] [--steps N] [--seed N]",
    ),
    Verb(
        "info",
        "what is installed, or what a run or model folder holds",
        info_options,
        info,
        usage="protoseg info [FOLDER] [--json] [--recipes FOLDER]",
    ),
)
