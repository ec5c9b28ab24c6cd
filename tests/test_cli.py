"""The command: fast help with examples, one line for what the user can mend, honest exit statuses."""

import argparse
import shlex
import signal
import subprocess
import sys

import pytest

from anabranch import cli
from anabranch.cli import build_parser, main
from anabranch.version import __version__


def with_children(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from with_children(child)


PARSERS = list(with_children(build_parser()))


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)` makes `anabranch bench linear` raise it."""

    def install(error):
        def run(args):
            raise error

        monkeypatch.setattr(cli.bench, "run", run)

    return install


def start(run):
    """A process in which `bench linear` does what `run`, a piece of source, says."""
    source = f"import sys, time, anabranch.cli as c; c.bench.run = {run}; sys.exit(c.main(['bench', 'linear']))"
    return subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"anabranch {__version__}\n"


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_every_help_has_examples_that_parse(parser):
    _, found, examples = parser.format_help().partition("examples:")
    assert found
    commands = [line.strip() for line in examples.splitlines() if line.strip().startswith("anabranch ")]
    assert commands
    for command in commands:
        words = shlex.split(command.split("   ")[0].split(" < ")[0])[1:]  # three spaces begin a remark
        if "--help" not in words:
            build_parser().parse_args(words)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_every_option_is_explained(parser):
    actions = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
    assert [action.dest for action in actions if not action.help] == []


def test_help_loads_nothing_heavy():
    source = """
import sys, contextlib
from anabranch.cli import main
with contextlib.suppress(SystemExit):
    main(["generate", "--help"])
sys.exit(str({"torch", "numpy", "transformers", "triton"} & set(sys.modules) or ""))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert "examples:" in done.stdout
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    "error",
    [ValueError("two\nlines"), FileNotFoundError(2, "No such file", "x"), ImportError("no")],
    ids=lambda error: type(error).__name__,
)
def test_what_the_user_can_mend_takes_one_line(error, failing, capsys):
    failing(error)
    assert main(["bench", "linear"]) == 2
    assert capsys.readouterr().err == f"anabranch: {' '.join(str(error).split())}\n"


def test_the_traceback_can_be_seen(failing):
    failing(ValueError("deep"))
    with pytest.raises(ValueError, match="deep"):
        main(["--traceback", "bench", "linear"])


def test_our_own_bugs_are_not_hidden(failing):
    failing(AssertionError("ours"))
    with pytest.raises(AssertionError, match="ours"):
        main(["bench", "linear"])


def test_ctrl_c_exits_with_130():
    process = start("lambda args: (print('on', flush=True), time.sleep(60))")
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")


def test_a_reader_that_leaves_ends_the_command_quietly():
    process = start("lambda args: [print('x' * 4096) for _ in range(4096)] and 0")
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141
