"""The ``vestige`` command: finds the verb among the modules of :mod:`vestige.commands`, and makes errors exit codes.

0: done. 1: failed work. 2: wrong use. 130: interrupted. Errors are one line on standard error;
``--debug`` shows the traceback.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import vestige
from vestige.core.method import did_you_mean
from vestige.errors import SpecError, VestigeError

__all__ = ["main"]

USAGE = """\
Usage: vestige VERB [ARGUMENTS]   (vestige VERB --help explains one)

Decide what a transformer keeps, and prove what remains.

Verbs
{verbs}

Options
  --version  Print the version.
  --debug    Show the traceback of an error.
  --help     Show this text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (that of the process by default) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    words = [word for i, word in enumerate(words) if word != "--debug" or i >= len(options)]
    resume = None
    try:
        if not words or words[0] in ("--help", "-h"):
            print(USAGE.format(verbs=_list_of_verbs()))
        elif words[0] == "--version":
            print(vestige.__version__)
        else:
            module = _find(words[0])
            resume = getattr(module, "RESUME", None)
            if (values := _read(module, words[0], words[1:])) is not None:
                module.run(**values)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _complain(130, f"interrupted; {resume}" if resume else "interrupted", debug)
    except BrokenPipeError:
        # Whoever read the output, such as head, has seen enough. Python must not try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SpecError as error:
        return _complain(2, str(error), debug)
    except VestigeError as error:
        return _complain(1, str(error), debug)
    except Exception as error:
        if isinstance(code := getattr(error, "exit_code", None), int):  # typer.Exit, from a verb
            return code
        hint = "" if debug else " (--debug shows where)"
        return _complain(1, f"unexpected {type(error).__name__}: {error}{hint}", debug)
    return 0


def _verbs() -> dict[str, Path]:
    files = sorted((Path(__file__).parent / "commands").glob("[!_]*.py"))
    return {file.stem.replace("_", "-"): file for file in files}


def _list_of_verbs() -> str:
    """Each verb with the first line of its module, read without importing it."""
    verbs = _verbs()
    width = max(map(len, verbs))
    lines = []
    for verb, file in verbs.items():
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {verb:<{width}}  {doc.partition(chr(10))[0]}")
    return "\n".join(lines)


def _find(verb: str) -> ModuleType:
    known = _verbs()
    if verb in known:
        return importlib.import_module(f"vestige.commands.{known[verb].stem}")
    if verb.startswith("-"):
        raise SpecError(f"unknown option {verb!r}; a verb comes first: {', '.join(known)}")
    raise SpecError(f"unknown verb {verb!r}; {did_you_mean(verb, known)}")


def _read(module: ModuleType, verb: str, words: list[str]) -> dict[str, Any] | None:
    """Let typer turn the words after a verb into its parameters; None where all that was asked for is its help."""
    if not words and all(p.default is not p.empty for p in inspect.signature(module.run).parameters.values()):
        return {}  # typer would load pydantic, which takes longer than listing all methods
    import typer
    from typer.main import get_command

    values = None

    # typer sees the signature of the verb's own function, which runs later, out of reach of typer's error handling.
    @functools.wraps(module.run)
    def keep(**given: Any) -> None:
        nonlocal values
        values = given

    app = typer.Typer(add_completion=False)
    app.command(verb, help=module.__doc__)(keep)
    try:
        get_command(app).main(args=words, prog_name=f"vestige {verb}", standalone_mode=False)
    except Exception as error:
        # Wrong use. typer's releases differ in where the class of such errors lives, not in what it can do.
        if not hasattr(error, "format_message"):
            raise
        raise SpecError(f"{error.format_message()} (vestige {verb} --help explains)") from error
    return values


def _complain(code: int, text: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"vestige: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
