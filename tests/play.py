"""Go through the blocks of a page in the current folder: save files, run commands, run Python in one namespace.

Reads the blocks from stdin and writes what each printed to the file named on the command line; pages.py calls it. What
a page claims in comments is checked: a statement of a block's top level may be followed, on its last line or the next,
by ``# -> VALUE`` (what it is, assigns or prints) or ``# raises ERROR: MESSAGE``; lines ``#    ...`` go on with it.
"""

import ast
import contextlib
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any

CLAIM = re.compile(r"# (?P<kind>->|raises) ?(?P<text>.*)")
CONTINUED = re.compile(r"#  +(?P<text>.*)")


def claims_of(text: str) -> dict[int, tuple[str, str]]:
    """Return what a block claims, by the line of the code that the claim follows."""
    claims: dict[int, tuple[str, str]] = {}
    last_code = open_claim = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if claim := CLAIM.fullmatch(token.string):
                open_claim = last_code
                assert open_claim not in claims, f"two claims on one statement: {token.string}"
                claims[open_claim] = (claim["kind"], claim["text"])
            elif open_claim and (more := CONTINUED.fullmatch(token.string)):
                kind, so_far = claims[open_claim]
                claims[open_claim] = (kind, f"{so_far} {more['text']}")
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            last_code, open_claim = token.end[0], 0
    return claims


def run_python(text: str, page: str, line: int, names: dict[str, Any]) -> str:
    """Run a block, statement by statement, and return what it printed."""
    claims = claims_of(text)
    printed = io.StringIO()
    for statement in ast.parse(text).body:
        claim = claims.pop(statement.end_lineno or 0, None)
        ast.increment_lineno(statement, line - 1)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            if claim is None:
                exec(compile(ast.Module([statement], []), page, "exec"), names)
            else:
                check(statement, *claim, page, names, output)
        printed.write(output.getvalue())
    assert not claims, f"{page}: claims on what is no statement of the block's top level: {claims}"
    return printed.getvalue()


def check(statement: ast.stmt, kind: str, text: str, page: str, names: dict[str, Any], output: io.StringIO) -> None:
    """Run one statement; AssertionError if it is not as claimed."""
    place = f"{page}:{statement.lineno}"
    if kind == "raises":
        try:
            exec(compile(ast.Module([statement], []), page, "exec"), names)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            assert text == got, f"{place} raises {got!r}, not {text!r}"
            return
        raise AssertionError(f"{place} raises nothing, not {text!r}")
    if isinstance(statement, ast.Expr):
        value = eval(compile(ast.Expression(statement.value), page, "eval"), names)
    else:
        assert isinstance(statement, ast.Assign), f"{place}: -> follows an expression or an assignment"
        exec(compile(ast.Module([statement], []), page, "exec"), names)
        value = eval(ast.unparse(statement.targets[0]), names)
    shown = {output.getvalue().strip()} if output.getvalue() else {repr(value), str(value)}
    assert text in shown, f"{place} gives {shown}, not {text!r}"


def main() -> None:
    """Do what stdin says."""
    report = Path(sys.argv[1])
    sys.path[0] = ""  # as for a reader's own `python`: what is in the current folder can be imported
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for step in json.load(sys.stdin):
        output = ""
        if step["action"] == "file":
            Path(step["name"]).write_text(step["text"], encoding="utf-8")
        elif step["action"] == "sh":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", step["text"]], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{step['page']}:{step['line']}: {done.stdout}{done.stderr}"
            output = done.stdout
        elif step["action"] == "python":
            output = run_python(step["text"], step["page"], step["line"], names)
        printed.append(output)
    report.write_text(json.dumps(printed), encoding="utf-8")


if __name__ == "__main__":
    main()
