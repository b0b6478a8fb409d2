"""The constants at the top of a script are also its command-line flags.

A setting is one line: an UPPER_CASE name with a type, a literal value and a trailing comment:

    BATCH_TOKENS: int = 65_536  # tokens per optimizer step
    LEARNING_RATE: float | None = None  # peak learning rate; None: the preset's

These lines also define the flags --batch-tokens and --learning-rate, with their type, default and help.
Types are int, float, bool and str, or a list of one of these, or any of them `| None`. Constants that are no settings
come after these lines, without a type or a comment.
"""

import argparse
import ast
import difflib
import io
import math
import os
import shlex
import sys
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from model.errors import UserError, require

REPO = Path(__file__).resolve().parent.parent

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
# Other spellings of words that settings take
SPELLINGS = {
    "true": "on",
    "false": "off",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "val": "validation",
}


class NoSuchSetting(UserError, AttributeError):
    """A script lacks a setting: its line was deleted or, if it was the last, its type or comment."""


class Settings(SimpleNamespace):
    """What read_settings returns."""

    def __getattr__(self, name: str) -> object:  # called for missing attributes
        raise NoSuchSetting(
            f"the script has no setting {name.upper()}: restore its line, with a type, a value and a trailing comment"
        )


@dataclass(frozen=True)
class Constant:
    name: str  # lower case, as in the namespace that read_settings returns
    value: object
    kind: type  # of the value, or of each element of a list
    optional: bool  # may be None
    many: bool  # a list: the flag takes several values and may be repeated
    help: str

    def accepts(self, value: object) -> bool:
        """Whether a value in the script has the type that its line declares."""
        if value is None:
            return self.optional
        if isinstance(value, list) != self.many:
            return False
        allowed = (int, float) if self.kind is float else (self.kind,)
        return all(type(one) in allowed for one in (value if self.many else [value]))

    def type_name(self) -> str:
        """The type in words: "a list of numbers or None"."""
        name = "True or False" if self.kind is bool else TYPE_NAMES[self.kind]
        words = f"a list of {name.removeprefix('a ')}s" if self.many else name
        return f"{words} or None" if self.optional else words


def read_constants(script: str | Path) -> list[Constant]:
    """The settings of a script, in file order, read from its source without running it."""
    source = Path(script).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    constants: dict[str, Constant] = {}
    incomplete = ""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            target, annotation = node.targets[0], ""
        elif isinstance(node, ast.AnnAssign):
            target, annotation = node.target, ast.unparse(node.annotation)
        else:
            continue
        if not (isinstance(target, ast.Name) and target.id.isupper()):
            continue
        place = f"{Path(script).name} line {node.lineno}: {target.id}"
        words = annotation.replace("[", " ").replace("]", " ").split()
        kind = next((kind for kind in TYPE_NAMES if kind.__name__ in words), None)
        if not (kind and node.value and node.end_lineno in comments):
            incomplete = incomplete or place
            continue
        require(
            not incomplete,
            f"{incomplete} needs a type, a value and a comment, like every setting (NAME: int = 5  # what it is)",
        )
        require(target.id.lower() not in constants, f"{place} is set twice: delete one of the lines")
        value, given = literal(node.value), ast.unparse(node.value)
        optional, many = "None" in words, "list" in words
        word = isinstance(node.value, ast.Name)
        if word and kind is str and not many and given.lower() != "none":
            raise UserError(f'{place} needs quotes around its value: "{given}"')
        require(word or value is not ..., f"{place} needs a literal value, not {given}")
        constant = Constant(target.id.lower(), value, kind, optional, many, comments[node.end_lineno])
        require(constant.accepts(value), f"{place} takes {constant.type_name()}, not {given}")
        constants[constant.name] = constant
    return list(constants.values())


def literal(node: ast.expr) -> object:
    """The value of a literal, or of arithmetic with numbers (64 * 1024); Ellipsis if it is neither."""
    parts = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)
    try:
        if isinstance(node, ast.BinOp) and all(isinstance(part, parts) for part in ast.walk(node)):
            return eval(compile(ast.Expression(node), "setting", "eval"))
        return ast.literal_eval(node)
    except (ValueError, TypeError, ArithmeticError):
        return ...


def parse_value(text: str, constant: Constant) -> object:
    """One command-line word as the constant's type. Raises ValueError, KeyError or OverflowError if it is not one."""
    if constant.optional and text.lower() == "none":
        return None
    if constant.kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    if constant.kind is int and not text.lstrip("+-").replace("_", "").isdigit():
        number = float(text)  # 1e6 is a whole number too
        if not number.is_integer():
            raise ValueError(text)
        return int(number)
    return constant.kind(text)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        if problem in ("expected one argument", "expected at least one argument"):
            message = f"{flag} needs a value (one that begins with - is written {flag}=-value)"
        raise UserError(f"{message} (see {self.prog} --help)")


def make_parser(
    constants: list[Constant],
    choices: dict[str, tuple[str, ...]],
    aliases: dict[str, str],
    prog: str,
    description: str,
) -> Parser:
    plain = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of the script's docstring
    parser = Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=plain)
    for constant in constants:

        def convert(text: str, constant: Constant = constant) -> object:
            flag = flag_name(constant.name)
            try:
                value = parse_value(text, constant)
            except (ValueError, KeyError, OverflowError):
                raise UserError(f"{flag} takes {TYPE_NAMES[constant.kind]}, not {text!r}") from None
            require(
                constant.kind is not int or abs(value or 0) < 2**63, f"{flag} must be below 2**63, not {text}"
            )
            return value

        options = {"type": convert, "default": argparse.SUPPRESS, "metavar": constant.kind.__name__.upper()}
        if constant.kind is bool:
            options |= {"nargs": "?", "const": True}
        if constant.many:
            options |= {"nargs": "+", "action": "extend"}
        default = shlex.join(map(str, constant.value)) if constant.many else constant.value
        default = "" if default in (None, "") else f" [{default}]"
        words = choices.get(constant.name, ())
        listed = "" if all(word in constant.help for word in words) else f" ({', '.join(words)})"
        others = [f"--{alias}" for alias, name in aliases.items() if flag_name(constant.name) == f"--{name}"]
        also = f" (also {', '.join(others)})" if others else ""
        text = (constant.help + default + listed + also).replace("%", "%%")
        parser.add_argument(flag_name(constant.name), help=text, **options)
    return parser


def normalise(word: str, kinds: dict[str, type], aliases: dict[str, str]) -> str:
    """Rewrite a flag to the form that the parser knows: --batch_tokens, an alias, --no-fresh for a switch.

    `kinds` maps all flags, without their dashes, to their types. Any other word stays as it is.
    """
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("_", "-")
    name = aliases.get(name, name)
    if name in kinds:
        return f"--{name}{equals}{value}"
    switch = name.removeprefix("no-")
    return f"--{switch}=false" if switch != name and kinds.get(switch) is bool and not equals else word


def read_settings(
    script: str | Path,
    argv: list[str] | None = None,
    *,
    choices: dict[str, tuple[str, ...]] | None = None,
    aliases: dict[str, str] | None = None,
    hints: dict[str, str] | None = None,
) -> SimpleNamespace:
    """A script's constants, overridden by its command line, as a namespace of lower-case names.

    `choices` lists the allowed values of a setting, `aliases` maps additional flag names to settings, and `hints` those
    of other programs to what does the same here. The namespace also has `given`, the names set on the command line,
    and `defaults`, the values in the file. A setting whose name ends in _dir becomes an absolute Path: a default is
    relative to the repository, a flag to the current directory.
    Raises UserError for an unknown flag or bad value.
    """
    constants, choices, aliases = read_constants(script), choices or {}, aliases or {}
    prog = os.path.relpath(script, REPO)
    docstring = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8"))) or ""
    parser = make_parser(constants, choices, aliases, prog, docstring)
    kinds = {flag_name(constant.name)[2:]: constant.kind for constant in constants}
    argv = sys.argv[1:] if argv is None else argv
    parsed, unknown = parser.parse_known_args([normalise(word, kinds, aliases) for word in argv])
    if unknown:
        refuse_unknown(unknown, prog, kinds, hints or {})

    given = vars(parsed)
    settings = Settings(given=set(given), defaults={c.name: c.value for c in constants})
    for constant in constants:
        value = given.get(constant.name, constant.value)
        allowed = choices.get(constant.name)
        if allowed and isinstance(value, str) and value not in allowed:
            value = SPELLINGS.get(value.lower(), value.lower())
        if allowed and value not in allowed and not (value is None and constant.optional):
            flag = flag_name(constant.name)
            raise UserError(f"{flag} takes {', '.join(allowed[:-1])} or {allowed[-1]}, not {value!r}")
        if constant.optional and value == "":  # such as an unset variable of the shell
            raise UserError(f"{flag_name(constant.name)} takes a name, not an empty one (or none)")
        if constant.name.endswith("_dir"):
            require(value, f"{flag_name(constant.name)} takes a folder, not an empty name")
            value = (Path.cwd() if constant.name in given else REPO) / os.path.expanduser(value)
        setattr(settings, constant.name, value)
    return settings


def refuse_unknown(words: list[str], prog: str, known: Iterable[str], hints: dict[str, str]) -> NoReturn:
    """Raise UserError for words of a command line that are no flags, or unknown ones, each with what may be meant."""
    require(words[0].startswith("-"), f"{prog} takes flags only, not {words[0]!r} (--help lists them)")
    problems = []
    flags = [words[0], *(word for word in words if word.startswith("--"))]  # the rest may be their values
    for word in dict.fromkeys(word.partition("=")[0] for word in flags):
        name = word.lstrip("-").replace("_", "-")
        nearest = difflib.get_close_matches(name, ["help", *known], n=1, cutoff=0.75)
        hint = hints.get(name) or (f"did you mean --{nearest[0]}?" if nearest else "")
        problems.append(f"{word} ({hint})" if hint else word)
    raise UserError(f"{prog} has no flag {', '.join(problems)}; --help lists all")


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def require_within(values: object, **intervals: str) -> None:
    """Raise UserError for an attribute of `values` outside its interval: dropout="[0, 1)". None is inside any."""
    for name, interval in intervals.items():
        value = getattr(values, name)
        shown = flag_name(name) if isinstance(values, Settings) else name
        require(value is None or isinstance(value, (int, float)), f"{shown} takes a number, not {value!r}")
        low, high = map(float, interval[1:-1].split(","))
        bounds = [f"above {low:.15g}" if interval[0] == "(" else f"at least {low:.15g}"]
        if high < math.inf:
            bounds.append(f"below {high:.15g}" if interval[-1] == ")" else f"at most {high:.15g}")
        elif value == math.inf:
            bounds.append("finite")
        inside = value is None or (
            (low < value or (low == value and interval[0] == "["))
            and (value < high or (value == high and interval[-1] == "]"))
        )
        require(inside, f"{shown} must be {' and '.join(bounds)}, not {value}")


def require_seed(seed: int) -> None:
    """Raise UserError if torch's or numpy's random generators would reject the seed."""
    valid = isinstance(seed, int) and 0 <= seed < 2**63
    require(valid, f"seed must be 0 or more and below 2**63, not {seed!r}")
