"""Settings of all tests."""

import pytest

pytest.register_assert_rewrite("tests.support")  # what fails in a helper is told as fully as in a test
