"""What a client is told of an engine that does not serve it."""

import pytest

from jaxserve.api.errors import ApiError
from jaxserve.api.refusals import told
from jaxserve.outputs import EngineError, QueueFull, RequestRefused


@pytest.mark.parametrize(
    ("failure", "status", "param", "comes_again"),
    [
        (QueueFull("4 wait"), 429, None, True),
        (EngineError("closed"), 503, None, True),
        (RequestRefused("too long", param="prompt"), 400, "prompt", False),
        (ApiError(404, "no such model", param="model"), 404, "model", False),
    ],
)
def test_each_failure_has_its_status_and_says_whether_to_come_again(
    failure: Exception, status: int, param: str | None, comes_again: bool
) -> None:
    error = told(failure)
    assert error is not None
    assert (error.status, error.param, error.retry_after_s is not None) == (status, param, comes_again)


def test_a_failure_that_nobody_foresaw_has_no_answer_of_its_own() -> None:
    assert told(RuntimeError("path /secret")) is None
