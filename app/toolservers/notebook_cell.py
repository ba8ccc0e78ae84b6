"""Runs one cell of Python from stdin, as a notebook does.

The value of a last expression is printed, tracebacks omit the frames of this file, and open figures of matplotlib are saved. A separate
program: `isolated_python.py` passes its text to the isolated interpreter.
"""

import ast
import linecache
import sys
import traceback
import types

NAME = "<cell>"


def main() -> None:
    """Run the cell; the exit status is 1 if it raised."""
    text = sys.stdin.read()
    linecache.cache[NAME] = (len(text), None, text.splitlines(keepends=True), NAME)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        run(text, module.__dict__)
        save_figures()
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 the user sees it
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != NAME:
            frames = frames.tb_next
        traceback.print_exception(error.with_traceback(frames))
        sys.exit(1)


def run(text: str, names: dict[str, object]) -> None:
    """Execute the text, and print the value of the expression it ends with."""
    tree = ast.parse(text, NAME)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NAME, "exec"), names)  # noqa: S102 its purpose
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), NAME, "eval"), names)  # noqa: S307
        if value is not None:
            print(repr(value))  # noqa: T201


def save_figures() -> None:
    """Save matplotlib's open figures as figure-1.png and so on, where a notebook would show them."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        for number in pyplot.get_fignums():
            pyplot.figure(number).savefig(f"figure-{number}.png")


if __name__ == "__main__":
    main()
