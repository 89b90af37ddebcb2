"""The command line: thin commands over the public API that import late what is heavy."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from vivace.cli.config import config
from vivace.cli.doctor import doctor
from vivace.cli.eval import evaluate
from vivace.cli.export import export
from vivace.cli.listings import ls, techniques, version
from vivace.cli.output import INTERRUPTED
from vivace.cli.pull import pull
from vivace.cli.quantize import quantize
from vivace.cli.run import run
from vivace.errors import UserError, VivaceError

__all__ = ["app", "main"]

BUG_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h

app = click.Group(
    "vivace",
    help="Run open-weight language models, with techniques that are chosen by measuring.",
    commands=[run, evaluate, ls, pull, export, quantize, techniques, doctor, config, version],
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    A user's mistake is one line on stderr and exit code 2; anything that is not one of our errors
    is a bug, says so, and exits with 70. `--debug` shows tracebacks.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = arguments or ["--help"]
    try:
        code = app(args=arguments, prog_name="vivace", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return _leave_quietly()
    except SystemExit as leaving:  # click's own way to report a broken pipe
        return _leave_quietly() if leaving.code == 1 else int(leaving.code or 0)
    except Exception as error:
        return _report(error)


def _leave_quietly() -> int:
    """Whoever read our output is gone: that is no error, and there is nobody to tell."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def _report(error: Exception) -> int:
    if isinstance(error, VivaceError):
        message, code = str(error), error.exit_code
    elif isinstance(error, click.ClickException):
        message, code = error.format_message(), UserError.exit_code
    elif isinstance(error, OSError):
        message, code = (
            f"{error.filename or 'system'}: {error.strerror or error}",
            VivaceError.exit_code,
        )
    else:
        message = f"this is a bug in vivace: {type(error).__name__}: {error} (--debug shows where)"
        code = BUG_EXIT_CODE
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code
