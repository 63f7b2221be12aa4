"""The Python of one page: takes blocks over a pipe, and runs them in one namespace, as one script."""

from __future__ import annotations

import os
import sys
import traceback
from multiprocessing.connection import Connection
from types import ModuleType


def serve(descriptor: int) -> None:
    """Run (page, line, code) after (page, line, code); answer None, or the traceback."""
    connection = Connection(descriptor)
    main = ModuleType("__main__")  # where pickle looks for the page's classes and functions
    sys.modules["__main__"] = main
    sys.path[0] = os.getcwd()
    sys.argv = ["page.py"]
    while True:
        try:
            page, line, code = connection.recv()
        except EOFError:
            return
        try:
            exec(compile("\n" * line + code, page, "exec"), main.__dict__)  # the page's own line numbers
            answer = None
        except SystemExit as error:
            answer = f"the block ends Python: SystemExit({error.code!r})" if error.code else None
        except BaseException:
            answer = traceback.format_exc()
        sys.stdout.flush()
        connection.send(answer)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
