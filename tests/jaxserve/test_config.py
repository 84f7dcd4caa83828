"""What the engine is told of KV transfer, by flags and in Python."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli import main
from jaxserve.cli.flags import add_engine, engine_config
from jaxserve.config import ConfigError, EngineConfig
from kv.config import parse

PRODUCER = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_producer"})
SIMPLE = json.dumps({"kv_connector": "SimpleCPUOffloadConnector", "kv_role": "kv_both"})


def configured(*flags: str, **environ: str) -> EngineConfig:
    parser = argparse.ArgumentParser()
    add_engine(parser)
    return engine_config(parser.parse_args(flags), "m", environ)


def test_without_flags_nothing_moves() -> None:
    config = configured()
    assert config.kv_transfer is None
    assert (config.side_channel_host, config.side_channel_port) == ("localhost", 5600)
    assert config.kv_auth_key_file is None


def test_flags_win_over_the_environment() -> None:
    environ = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.2", "VLLM_NIXL_SIDE_CHANNEL_PORT": "5601"}
    chosen = configured("--kv-transfer-config", PRODUCER, **environ)
    assert chosen.kv_transfer == parse(PRODUCER)
    assert (chosen.side_channel_host, chosen.side_channel_port) == ("127.0.0.2", 5601)
    flags = ("--nixl-side-channel-host", "::1", "--nixl-side-channel-port", "0")
    chosen = configured("--kv-transfer-config", PRODUCER, *flags, **environ)
    assert (chosen.side_channel_host, chosen.side_channel_port) == ("::1", 0)
    empty = configured(VLLM_NIXL_SIDE_CHANNEL_HOST="", VLLM_NIXL_SIDE_CHANNEL_PORT="")
    assert (empty.side_channel_host, empty.side_channel_port) == ("localhost", 5600)


@pytest.mark.parametrize("backend", [[], ["--kv-offloading-backend", "native"]])
def test_the_short_form_is_an_offloading_connector(backend: list[str]) -> None:
    long = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 3 << 29},
    }
    assert configured("--kv-offloading-size", "1.5", *backend).kv_transfer == parse(json.dumps(long))


def test_beyond_this_machine_a_key_is_named() -> None:
    beyond = ("--kv-transfer-config", PRODUCER, "--nixl-side-channel-host", "10.0.0.1")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1.*--kv-auth-key-file"):
        configured(*beyond)
    assert configured(*beyond, "--kv-auth-key-file", "key").kv_auth_key_file == Path("key")
    # An engine that opens no side channel has no address to defend.
    assert configured("--nixl-side-channel-host", "10.0.0.1").side_channel_host == "10.0.0.1"


WRONG_FLAGS = [
    (["--kv-transfer-config", "{"], "--kv-transfer-config: not JSON"),
    (["--kv-transfer-config", ""], "--kv-transfer-config: not JSON"),
    (["--kv-transfer-config", '{"kv_connector": "X"}'], "--kv-transfer-config: kv_connector"),
    (["--kv-transfer-config", SIMPLE, "--kv-offloading-size", "1"], "contradict"),
    (["--kv-transfer-config", SIMPLE, "--no-enable-prefix-caching"], "SimpleCPUOffloadConnector"),
    (["--kv-offloading-size", "1", "--no-enable-prefix-caching"], "OffloadingConnector"),
    (["--kv-offloading-backend", "native"], "--kv-offloading-backend needs"),
    (["--kv-offloading-size", "0"], "--kv-offloading-size"),
    (["--kv-offloading-size", "-1"], "--kv-offloading-size"),
    (["--kv-offloading-size", "nan"], "--kv-offloading-size"),
    (["--kv-offloading-size", "1e300"], "--kv-offloading-size"),
    (["--kv-transfer-config", PRODUCER, "--nixl-side-channel-port", "65536"], "--nixl-side-channel-port"),
    (["--kv-transfer-config", PRODUCER, "--nixl-side-channel-port", "-1"], "--nixl-side-channel-port"),
    (["--kv-transfer-config", PRODUCER, "--nixl-side-channel-host", ""], "--nixl-side-channel-host"),
    (["--kv-transfer-config", PRODUCER, "--nixl-side-channel-host", "a\nb"], "--nixl-side-channel-host"),
    (["--kv-transfer-config", PRODUCER, "--nixl-side-channel-host", "0.0.0.0"], "peers are told"),
]


@pytest.mark.parametrize(("flags", "problem"), WRONG_FLAGS, ids=lambda value: str(value)[-40:])
def test_a_wrong_flag_ends_the_start_with_one_line(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "m", *flags]) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("port", ["x", "-1", "5600.0", "99999", "9" * 5000, "٣"])
def test_the_environments_port_is_checked(port: str) -> None:
    with pytest.raises(ConfigError, match=r"VLLM_NIXL_SIDE_CHANNEL_PORT|--nixl-side-channel-port"):
        configured("--kv-transfer-config", PRODUCER, VLLM_NIXL_SIDE_CHANNEL_PORT=port)


@pytest.mark.parametrize("value", [SIMPLE, json.loads(SIMPLE)])
def test_python_takes_what_parse_returns(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"kv\.config\.parse"):
        EngineConfig(model="m", kv_transfer=value)
    assert EngineConfig(model="m", kv_transfer=parse(SIMPLE)).kv_transfer == parse(SIMPLE)


def test_nixl_needs_no_prefix_cache() -> None:
    assert configured("--kv-transfer-config", PRODUCER, "--no-enable-prefix-caching").kv_transfer


@pytest.mark.parametrize("command", [["serve"], ["bench", "serve"]])
def test_an_unknown_flag_shows_the_usage_of_its_command(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--no-such-flag"])
    said = capsys.readouterr().err
    assert said.startswith(f"usage: jaxserve {' '.join(command)} ")
    assert "--no-such-flag" in said
