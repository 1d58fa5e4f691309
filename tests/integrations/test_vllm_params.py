"""kv_transfer_params are attacker input; kv_connector_extra_config is the operator's."""

from __future__ import annotations

import os

import pytest

from pdrelay.errors import ConfigError, InvalidRequestError
from pdrelay.integrations.vllm.config import connector_config, instance_address, rank_address
from pdrelay.integrations.vllm.params import (
    RemoteDecode,
    RemotePrefill,
    parse_params,
    reply_params,
)


@pytest.fixture
def peer_dir(tmp_path):
    (tmp_path / "peers").mkdir()
    return str(tmp_path / "peers")


def parse(params, peer_dir):
    return parse_params(params, request_id="req-1", peer_dir=peer_dir)


@pytest.mark.parametrize(
    "params",
    [None, {}, {"do_remote_prefill": False}, {"remote_engine_id": None, "do_remote_decode": False}],
)
def test_what_asks_nothing_of_us(params, peer_dir):
    assert parse(params, peer_dir) is None


def test_producer_and_its_reply(peer_dir):
    assert parse({"do_remote_decode": True}, peer_dir) == RemoteDecode("req-1")
    params = parse({"do_remote_decode": True, "pdrelay_transfer_id": "a-1"}, peer_dir)
    assert params == RemoteDecode("a-1")
    address = f"{peer_dir}/p.sock"
    assert parse(reply_params("a-1", address), peer_dir) == RemotePrefill("a-1", address)


@pytest.mark.parametrize("value", ["", "a/b", "a b", "x" * 129, "é", 7, None, ["a"], b"a", "a\n"])
@pytest.mark.parametrize("flag", ["do_remote_decode", "do_remote_prefill"])
def test_bad_transfer_ids(value, flag, peer_dir):
    params = {flag: True, "pdrelay_transfer_id": value, "pdrelay_producer": f"{peer_dir}/p"}
    with pytest.raises(InvalidRequestError, match="pdrelay_transfer_id"):
        parse(params, peer_dir)


@pytest.mark.parametrize("flag", ["do_remote_decode", "do_remote_prefill"])
@pytest.mark.parametrize("value", [1, "true", None, []])
def test_flags_are_booleans(flag, value, peer_dir):
    with pytest.raises(InvalidRequestError, match=flag):
        parse({flag: value}, peer_dir)


def test_both_at_once(peer_dir):
    with pytest.raises(InvalidRequestError, match="excludes"):
        parse({"do_remote_decode": True, "do_remote_prefill": True}, peer_dir)


def test_not_an_object(peer_dir):
    with pytest.raises(InvalidRequestError):
        parse(["do_remote_decode"], peer_dir)


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "p.sock", "", "{dir}/../p.sock", "{dir}/sub/p.sock", "{dir}/a\0b"),
        *(
            "{dir}",
            "{dir}/link/p.sock",
            "{dir}/out.sock",
            5,
            None,
            ["{dir}/p"],
            "{dir}/" + "x" * 200,
        ),
        "{dir}/\ud800",
    ],
)
def test_no_producer_outside_the_directory(path, peer_dir):
    os.symlink("/tmp", f"{peer_dir}/link")
    os.symlink("/tmp/elsewhere.sock", f"{peer_dir}/out.sock")
    if isinstance(path, str):
        path = path.replace("{dir}", peer_dir)
    params = {"do_remote_prefill": True, "pdrelay_transfer_id": "a", "pdrelay_producer": path}
    with pytest.raises(InvalidRequestError, match="pdrelay_producer"):
        parse(params, peer_dir)


def test_directory_may_itself_be_a_link(peer_dir, tmp_path):
    os.symlink(peer_dir, tmp_path / "alias")
    params = reply_params("a", f"{peer_dir}/p.sock")
    assert parse(params, str(tmp_path / "alias")) == RemotePrefill("a", f"{peer_dir}/p.sock")


# ---- configuration


def test_defaults():
    config = connector_config({"address": "/run/x/p.sock"}, is_producer=True, is_consumer=True)
    assert (config.peer_dir, config.transport) == ("/run/x", "auto")
    assert (config.lease_s, config.load_timeout_s) == (30.0, 120.0)


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({}, '"address"'),
        ({"adress": "/run/x"}, "adress"),
        ({"address": 5}, "address"),
        ({"address": "p.sock"}, "absolute"),
        ({"address": "/" + "x" * 120}, "shorter"),
        ({"address": "/x", "peer_dir": "y"}, "peer_dir"),
        ({"address": "/x", "lease_s": 0}, "lease_s"),
        ({"address": "/x", "lease_s": "30"}, "lease_s"),
        ({"address": "/x", "transport": "carrier pigeon"}, "transport"),
    ],
)
def test_bad_settings_name_the_key(extra, why):
    with pytest.raises(ConfigError, match=why):
        connector_config(extra, is_producer=True, is_consumer=True)


def test_a_consumer_needs_a_directory_only():
    config = connector_config({"peer_dir": "/run/x"}, is_producer=False, is_consumer=True)
    assert config.peer_dir == "/run/x"
    with pytest.raises(ConfigError, match="peer_dir"):
        connector_config({}, is_producer=False, is_consumer=True)


def test_addresses_of_ranks_and_engines():
    assert [rank_address("/a", rank) for rank in range(3)] == ["/a", "/a.1", "/a.2"]
    assert [instance_address("/a", rank) for rank in range(2)] == ["/a", "/a.d1"]
    assert instance_address("", 1) == ""
