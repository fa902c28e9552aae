"""One row, one process: peak memory is a high-water mark, and no row warms another's caches."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Progress = Callable[[str], None]


class Workers:
    """Runs functions in fresh processes, forked from a server that has already imported torch and transformers."""

    def __init__(self) -> None:
        can_fork = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
        if can_fork:
            self._context.set_forkserver_preload(["longctx.demo.measure"])

    def run(self, function: Callable[..., Any], *args: Any, progress: Progress) -> Any:
        """``function(*args, progress)`` in a process of its own; raises where it raised or died."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_call, args=(sender, function, args))
        process.start()
        sender.close()
        try:
            while True:
                kind, value = receiver.recv()
                if kind == "progress":
                    progress(value)
                elif kind == "error":
                    raise RuntimeError(f"longctx demo: {function.__name__} failed in its process:\n{value}")
                else:
                    return value
        except EOFError:
            process.join()
            raise RuntimeError(
                f"longctx demo: the process of {function.__name__} ended with exit code {process.exitcode} "
                "and no result (out of memory?)"
            ) from None
        finally:
            process.join()
            receiver.close()


def _call(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send(("result", function(*args, lambda step: sender.send(("progress", step)))))
    except BaseException:
        sender.send(("error", traceback.format_exc()))
    finally:
        sender.close()
