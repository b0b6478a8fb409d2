"""A script's constants are its command line."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, REPO, assert_one_line_error

from model.errors import UserError
from model.script import LESS
from model.settings import read_constants, read_settings

SCRIPT = '''"""A script of one page."""
import sys
sys.path.insert(0, {repo!r})
from model.script import run_script
from model.settings import read_settings

STEPS: int = 65_536  # optimizer steps, 100 % of them
RATE: float = 0.5  # a number
NAME: str = "cat"  # a word
FRESH: bool = False  # begin anew
TIED: bool = True  # share the weights
PROMPT: list[str] = []  # several words
SIZES: list[int] = [1, 2]  # several numbers
DEPTH: int | None = None  # none by default
TIE: bool | None = None  # yes, no or neither
BLOCKS: str | None = None  # a word or none
DATA_DIR: str = "data"  # a folder

INTERNAL = 7
lower = 8  # is no setting
TABLE = dict(a=1)


def main():
    settings = read_settings(__file__, choices={{"blocks": ("modern", "gpt2")}}, aliases={{"lr": "rate"}})
    print(vars(settings))


if __name__ == "__main__":
    run_script(main)
'''

NAMES = "steps rate name fresh tied prompt sizes depth tie blocks data_dir".split()


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(repo=str(REPO)), encoding="utf-8")
    return path


@pytest.fixture
def read(script):
    """read("--steps", "3") -> the settings of the script under that command line."""

    def read(*argv):
        return read_settings(
            script,
            list(argv),
            choices={"blocks": ("modern", "gpt2")},
            aliases={"lr": "rate", "n": "steps"},
            hints={"batch-size": "--steps is what you want"},
        )

    return read


def test_a_value_that_looks_like_a_flag_is_not_rewritten(read):
    assert read("--prompt", "--Hello_there friend").prompt == ["--Hello_there friend"]


def test_only_commented_upper_case_constants_are_settings(script):
    assert [constant.name for constant in read_constants(script)] == NAMES


def test_without_flags_the_constants_are_the_settings(read):
    settings = read()
    assert settings.given == set()
    assert (settings.steps, settings.rate, settings.name) == (65_536, 0.5, "cat")
    assert (settings.fresh, settings.tied, settings.prompt, settings.sizes) == (False, True, [], [1, 2])
    assert settings.depth is settings.tie is settings.blocks is None
    assert settings.defaults == {name: getattr(settings, name) for name in NAMES} | {"data_dir": "data"}


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ("--steps 3", "steps", 3),
        ("--steps=3", "steps", 3),
        ("--steps 65_537", "steps", 65_537),
        ("--steps 1e6", "steps", 1_000_000),
        ("--steps -5", "steps", -5),
        ("--steps 3 --steps 4", "steps", 4),
        ("--rate 1e-3", "rate", 0.001),
        ("--rate 2", "rate", 2.0),
        ("--lr 0.25", "rate", 0.25),
        ("--n 5", "steps", 5),
        ("--name 7", "name", "7"),
        ("--name none", "name", "none"),
        ("--fresh", "fresh", True),
        ("--fresh=true", "fresh", True),
        ("--fresh 0", "fresh", False),
        ("--no-tied", "tied", False),
        ("--tied no", "tied", False),
        ("--tied FALSE", "tied", False),
        ("--tie", "tie", True),
        ("--no_tie", "tie", False),
        ("--tie none", "tie", None),
        ("--depth 12", "depth", 12),
        ("--depth None", "depth", None),
        ("--blocks gpt2", "blocks", "gpt2"),
        ("--blocks none", "blocks", None),
        ("--prompt a b", "prompt", ["a", "b"]),
        ("--prompt a --steps 3 --prompt b c", "prompt", ["a", "b", "c"]),
        ("--sizes 4 5_000 1e2", "sizes", [4, 5_000, 100]),
    ],
)
def test_flags_override_constants_with_their_type(read, argv, name, value):
    settings = read(*argv.split())
    assert getattr(settings, name) == value and type(getattr(settings, name)) is type(value)
    assert name in settings.given
    others = [n for n in NAMES if n not in settings.given]
    assert all(getattr(settings, n) == getattr(read(), n) for n in others)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *[("val", "validation"), ("bf16", "bfloat16"), ("FP16", "float16"), ("fp32", "float32")],
        *[("true", "on"), ("False", "off"), ("Train", "train"), ("BFloat16", "bfloat16")],
    ],
)
def test_a_word_may_be_spelt_otherwise(script, word, value):
    words = "train validation on off float32 bfloat16 float16".split()
    assert read_settings(script, ["--blocks", word], choices={"blocks": tuple(words)}).blocks == value


def test_underscores_and_dashes_are_one(read, tmp_path):
    assert read("--data_dir", "x").data_dir == read("--data-dir=x").data_dir


def test_a_value_keeps_its_underscores_spaces_and_dashes(read):
    assert read("--name=no_where-at all").name == "no_where-at all"
    assert read("--prompt", "one_two three", "-").prompt == ["one_two three", "-"]


def test_a_default_list_is_not_shared_between_reads(read):
    read("--prompt", "a")
    read("--sizes", "3")
    assert (read().prompt, read().sizes) == ([], [1, 2])


def test_folders_default_to_the_repository_and_flags_to_the_current_one(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read().data_dir == REPO / "data"
    assert read("--data-dir", "data").data_dir == tmp_path / "data"
    assert read("--data-dir", str(REPO)).data_dir == REPO
    assert read("--data-dir=~/data").data_dir == Path.home() / "data"  # where the shell expands nothing


@pytest.mark.parametrize(
    ("argv", "needles"),
    [
        ("--stepz 3", ["--stepz", "did you mean --steps?"]),
        ("--step=3", ["no flag --step (did you mean --steps?)"]),  # never taken for --steps by itself
        ("--no-steps", ["no flag --no-steps", "did you mean --steps?"]),
        ("--no-name", ["no flag --no-name"]),  # not the word "false"
        ("--no-prompt", ["no flag --no-prompt"]),
        ("--no-frseh", ["--no-frseh"]),
        ("--data-dirs x", ["did you mean --data-dir?"]),
        ("--internal 3", ["no flag --internal"]),
        ("--zzzzzz", ["no flag --zzzzzz; --help"]),
        ("stray", ["takes flags only, not 'stray'"]),
        ("--batch_size 8", ["no flag --batch_size (--steps is what you want)"]),
        ("--steps many", ["--steps takes a whole number, not 'many'"]),
        ("--steps 1.5", ["--steps takes a whole number, not '1.5'"]),
        ("--steps inf", ["--steps takes a whole number"]),
        ("--steps none", ["--steps takes a whole number"]),
        ("--steps=", ["--steps takes a whole number"]),
        ("--steps", ["--steps"]),
        ("--rate fast", ["--rate takes a number, not 'fast'"]),
        ("--lr fast", ["--rate takes a number"]),
        ("--fresh maybe", ["--fresh takes true or false, not 'maybe'"]),
        ("--sizes 1 b", ["--sizes takes a whole number, not 'b'"]),
        ("--sizes", ["--sizes"]),
        ("--blocks llama", ["--blocks takes modern or gpt2, not 'llama'"]),
    ],
)
def test_a_bad_command_line_is_a_user_error_that_says_what_to_do(read, argv, needles):
    with pytest.raises(UserError) as caught:
        read(*argv.split())
    for needle in needles:
        assert needle in str(caught.value)


def run_file(script, *argv, cwd=None):
    return subprocess.run(
        [sys.executable, str(script), *argv], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE
    )


def test_a_bad_flag_ends_in_one_line_and_status_2(script, tmp_path):
    result = run_file(script, "--stepz", "3", cwd=tmp_path)
    assert_one_line_error(result, "--stepz", "did you mean --steps?")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("line", "edited", "needles"),
    [
        ("STEPS: int = 65_536  #", "STEPS: int = 2 * 3**2  #", None),
        ("RATE: float = 0.5  #", "RATE: float = -1 / 4  #", None),
        ("DEPTH: int | None = None  #", "DEPTH: int | None = 3  #", None),
        (
            "DEPTH: int | None = None  #",
            'DEPTH: int | None = "3"  #',
            ["DEPTH takes a whole number or None", "'3'"],
        ),
        (
            "DEPTH: int | None = None  #",
            "DEPTH: int | None = 20.5  #",
            ["DEPTH takes a whole number", "20.5"],
        ),
        (
            "DEPTH: int | None = None  #",
            "DEPTH: int | None = True  #",
            ["DEPTH takes a whole number", "True"],
        ),
        ("SIZES: list[int] = [1, 2]", "SIZES: list[int] = 1", ["SIZES takes a list of whole numbers, not 1"]),
        ("PROMPT: list[str] = []", 'PROMPT: list[str] = ["a", 1]', ["PROMPT takes a list of strings"]),
        ('NAME: str = "cat"', "NAME: str = NAMES[1]", ["NAME needs a literal value, not NAMES[1]"]),
        ('NAME: str = "cat"', 'NAME: str = "c" * 3', None),
        ('NAME: str = "cat"', "NAME: str = cat", ['NAME needs quotes around its value: "cat"']),
        ('NAME: str = "cat"', "NAME: str = none", ["NAME takes a string, not none"]),
        ("PROMPT: list[str] = []", "PROMPT: list[str] = cat", ["PROMPT takes a list of strings, not cat"]),
        ("FRESH: bool = False  #", "FRESH: bool = false  #", ["FRESH takes True or False, not false"]),
        ("STEPS: int = 65_536  #", "STEPS: int = 1 // 0  #", ["STEPS needs a literal value, not 1 // 0"]),
        (
            "int = 65_536  # optimizer steps, 100 % of them",
            "int = 65_536",
            ["STEPS needs a type, a value and a"],
        ),
        ("STEPS: int = 65_536  #", "STEPS = 65_536  #", ["STEPS needs a type"]),
        ("STEPS: int = 65_536  #", "STEPS: int  #", ["STEPS needs a type, a value"]),
        ("STEPS: int = 65_536  #", "STEPS: int = None  #", ["STEPS takes a whole number, not None"]),
        ("STEPS: int = 65_536  #", "STEPS: int = 1e3  #", ["STEPS takes a whole number, not 1000.0"]),
        ("FRESH: bool = False  #", 'FRESH: bool = "no"  #', ["FRESH takes True or False, not 'no'"]),
        ('NAME: str = "cat"', "NAME: str = True", ["NAME takes a string, not True"]),
        (
            "PROMPT: list[str] = []",
            'PROMPT: list[str] = "abc"',
            ["PROMPT takes a list of strings, not 'abc'"],
        ),
        ("RATE: float = 0.5  #", "RATE: float = 0.5  # old\nRATE: float = 0.25  #", ["RATE is set twice"]),
        ("PROMPT: list[str] = []", 'PROMPT = ["a"]', ["PROMPT needs a type"]),
        ("DEPTH: int | None = None  #", "DEPTH = None  #", ["DEPTH needs a type"]),
    ],
)
def test_an_edited_constant_is_checked_as_a_flag_is(script, line, edited, needles):
    text = script.read_text()
    assert line in text
    script.write_text(text.replace(line, edited))
    if needles is None:
        name = edited.split()[0].rstrip(":")
        value = eval(edited.split("=", 1)[1].split("#")[0])
        assert next(c.value for c in read_constants(script) if c.name == name.lower()) == value
    else:
        with pytest.raises(UserError) as error:
            read_constants(script)
        assert all(needle in str(error.value) for needle in ["script.py line ", *needles])


def test_a_setting_that_lost_its_line_is_named(script):
    script.write_text(script.read_text().replace("STEPS: int = 65_536  # optimizer steps, 100 % of them", ""))
    settings = read_settings(script, [])
    with pytest.raises(UserError, match="no setting STEPS"):
        settings.steps  # noqa: B018


def test_help_and_values_through_a_real_command_line(script, tmp_path):
    result = run_file(script, "--steps", "7", "--no-tied", "--prompt", "a b", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    for part in ("'steps': 7", "'tied': False", "'prompt': ['a b']", "'name': 'cat'"):
        assert part in result.stdout
    result = run_file(script, "--help")
    assert result.returncode == 0 and "100 % of them [65536]" in " ".join(result.stdout.split())
    assert result.stdout.count("(also --lr)") == 1


STOPPED = """
import sys, time
sys.path.insert(0, {repo!r})
from model.script import run_script

def main():
    sys.stdin.read()  # until the reader of our output is gone
    print("saved")
    sys.exit(130)

run_script(main)
"""


def test_a_stop_keeps_its_status_when_nobody_reads_its_last_words(tmp_path):
    """As when Ctrl-C also ends the `tee` after a pipe."""
    (tmp_path / "stopped.py").write_text(STOPPED.format(repo=str(REPO)), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, tmp_path / "stopped.py"],
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()
    errors = process.stderr.read()
    assert process.wait(timeout=PATIENCE) == 130 and errors == b""


FAILING = """
import sys
sys.path.insert(0, {repo!r})
from model.errors import UserError
from model.script import run_script

def main():
    print("some output")
    raise {error}

run_script(main)
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("UserError('two\\nlines  become one')", "two lines become one"),
        ("OSError(28, 'No space left on device', 'big.bin')", "big.bin"),
        ("PermissionError(13, 'Permission denied', 'mine.bin')", "mine.bin"),
        ("MemoryError('Unable to allocate 4.44 PiB for an array')", "not enough memory for 4.44 PiB at once"),
        ("MemoryError", f"not enough memory: {LESS}"),
        (
            "RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16 GiB')",
            f"not enough GPU memory for 2.00 GiB at once: {LESS}, or --device cpu",
        ),
        ("__import__('torch').empty(2**52)", "not enough memory for 18014398509481984 bytes at once"),
    ],
)
def test_what_the_user_can_mend_is_one_line_without_traceback(tmp_path, error, message):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(repo=str(REPO), error=error), encoding="utf-8")
    result = run_file(script)
    assert_one_line_error(result, message)
    assert result.stdout == "some output\n"


@pytest.mark.parametrize(
    ("error", "status"), [("KeyboardInterrupt", 130), ("SystemExit(3)", 3), ("BrokenPipeError", 141)]
)
def test_interruptions_have_the_usual_exit_status(tmp_path, error, status):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(repo=str(REPO), error=error), encoding="utf-8")
    result = run_file(script)
    assert result.returncode == status and "Traceback" not in result.stderr


def test_interrupted_while_torch_is_imported_a_script_just_ends(run, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    result = run("generate.py", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == -signal.SIGINT and not result.stderr and not result.stdout


def test_a_python_without_the_packages_is_named(tmp_path):
    """As after quickstart.sh, in a shell that has not activated .venv."""
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); import model.script"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert_one_line_error(result, sys.executable, "is a Python without the packages: run ")


def test_a_defect_keeps_its_traceback(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(repo=str(REPO), error="ZeroDivisionError"), encoding="utf-8")
    result = run_file(script)
    assert result.returncode == 1 and "Traceback" in result.stderr


SCRIPTS = [
    path.relative_to(REPO).as_posix()
    for path in [*sorted(REPO.glob("*.py")), *sorted((REPO / "data").glob("*.py"))]
    if "read_settings(" in path.read_text(encoding="utf-8")
]


def test_the_steps_are_among_the_scripts():
    assert {"train.py", "generate.py", "evaluate.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_setting_with_its_comment(run, tmp_path, name):
    result = run(name, "--help", cwd=tmp_path, check=0)
    assert result.stderr == ""
    text = "".join(result.stdout.split())  # however the lines are wrapped
    constants = read_constants(REPO / name)
    assert constants
    for constant in constants:
        flag = "--" + constant.name.replace("_", "-")
        value = shlex.join(map(str, constant.value)) if constant.many else constant.value
        shown = constant.help if value in (None, "") else f"{constant.help} [{value}]"
        assert flag in text and "".join(shown.split()) in text, flag


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_is_used(name):
    source = (REPO / name).read_text(encoding="utf-8")
    used = set(re.findall(r"settings\.(\w+)", source))
    if name == "train.py":  # which hands its settings to many
        from model.config import CONFIG_FIELDS, RECIPE_FIELDS

        for path in (REPO / "model").glob("*.py"):
            used |= set(re.findall(r"settings\.(\w+)", path.read_text(encoding="utf-8")))
        used |= {*CONFIG_FIELDS, *RECIPE_FIELDS}
    unused = [c.name for c in read_constants(REPO / name) if c.name not in used]
    assert unused == []


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_during_garbage_collection_still_stops(tmp_path, name, status):
    """Python drops an exception that comes up in a finalizer, and with it the signal's."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPO)!r})
from model.script import run_script

class Finalized:
    def __del__(self):
        signal.raise_signal(signal.{name})
        time.sleep(0.01)

def main():
    Finalized()
    time.sleep(5)
    print("went on")

run_script(main)
""",
        encoding="utf-8",
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == status and result.stdout == "" and "Exception" not in result.stderr


def test_an_unquoted_word_in_a_script_ends_in_one_line(tmp_path):
    """Python itself would end in a NameError before the settings are read."""
    shutil.copytree(REPO / "model", tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    text = (REPO / "train.py").read_text()
    (tmp_path / "train.py").write_text(text.replace('DTYPE: str = "auto"', "DTYPE: str = bfloat16"))
    command = [sys.executable, tmp_path / "train.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert_one_line_error(result, "train.py line ", 'DTYPE needs quotes around its value: "bfloat16"')
