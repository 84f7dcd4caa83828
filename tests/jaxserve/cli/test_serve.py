"""The server's keys, from flags and environment."""

import pytest

from jaxserve.cli import parser
from jaxserve.cli.serve import server_options
from jaxserve.config import ConfigError
from jaxserve.server import ServerOptions


def options(*flags: str, **environ: str) -> ServerOptions:
    return server_options(parser().parse_args(["serve", *flags]), environ)


def test_there_is_no_key_by_default() -> None:
    assert (options().api_keys, options().admin_key) == ((), None)
    assert options(VLLM_API_KEY="", JAXSERVE_ADMIN_API_KEY="") == options()


def test_keys_come_from_flags_else_from_the_environment() -> None:
    environ = {"VLLM_API_KEY": "c", "JAXSERVE_ADMIN_API_KEY": "a"}
    assert (options(**environ).api_keys, options(**environ).admin_key) == (("c",), "a")
    given = options("--api-key", "1", "2", "--admin-api-key", "3", **environ)
    assert (given.api_keys, given.admin_key) == (("1", "2"), "3")


@pytest.mark.parametrize(
    ("flags", "environ"),
    [
        (["--admin-api-key", ""], {}),
        (["--admin-api-key", ""], {"JAXSERVE_ADMIN_API_KEY": "a"}),
        (["--api-key", "1", "2", "--admin-api-key", "2"], {}),
        (["--api-key", "a"], {"JAXSERVE_ADMIN_API_KEY": "a"}),
        ([], {"VLLM_API_KEY": "a", "JAXSERVE_ADMIN_API_KEY": "a"}),
    ],
    ids=str,
)
def test_an_admin_key_that_protects_nothing_is_refused(flags: list[str], environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--admin-api-key"):
        options(*flags, **environ)
