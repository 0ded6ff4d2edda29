"""Ctrl-C is seen even where an engine swallowed it."""

import threading

import pytest

from raylp.progress import Reporter, interrupted


def test_a_swallowed_interrupt_is_raised_at_the_next_sign_of_progress() -> None:
    with Reporter(quiet=True).task("work", 3) as task:
        task.advance()
        interrupted.set()
        try:
            other = threading.Thread(target=task.beat)  # a heartbeat: not its to stop the work
            other.start()
            other.join()
            with pytest.raises(KeyboardInterrupt):
                task.beat()
        finally:
            interrupted.clear()
        task.advance()
    assert task.done == 2
