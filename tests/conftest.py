"""Settings of all tests."""

import gc
import signal

import pytest

pytest.register_assert_rewrite("tests.support")  # what fails in a helper is told as fully as in a test

# A shell's background jobs ignore Control-C, and so would all that tests start: they send it, and wait for what it does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Thousands of tests and what they import are there to the end: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()
