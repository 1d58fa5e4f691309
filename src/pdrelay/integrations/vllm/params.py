"""The `kv_transfer_params` of a request, validated: they may come from whoever sent the request."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdrelay.errors import InvalidRequestError
from pdrelay.integrations.vllm.config import MAX_PATH_BYTES

_TRANSFER_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}", re.ASCII)


@dataclass(frozen=True)
class RemoteDecode:
    """For a producer: keep the prompt's KV and push it to whoever announces `transfer_id`."""

    transfer_id: str


@dataclass(frozen=True)
class RemotePrefill:
    """For a consumer: the prompt's KV comes from the producer that listens at `producer`."""

    transfer_id: str
    producer: str


def parse_params(
    params: Mapping[str, Any] | None, *, request_id: str, peer_dir: str
) -> RemoteDecode | RemotePrefill | None:
    """What the request asks for; None where it asks nothing of this connector.

    A producer's request without an id gets `request_id` as its transfer id, which its reply hands
    on. Raises InvalidRequestError for values of wrong type or form, and for a producer's path that
    does not lie directly in `peer_dir`, symbolic links resolved.
    """
    if params is None:
        return None
    if not isinstance(params, Mapping):
        raise InvalidRequestError("kv_transfer_params is not an object", "kv_transfer_params")
    decode = _flag(params, "do_remote_decode")
    prefill = _flag(params, "do_remote_prefill")
    if decode and prefill:
        raise _bad("do_remote_decode", "excludes do_remote_prefill")
    if decode:
        return RemoteDecode(_transfer_id(params.get("pdrelay_transfer_id", request_id)))
    if prefill:
        transfer_id = _transfer_id(params.get("pdrelay_transfer_id"))
        return RemotePrefill(transfer_id, _producer(params.get("pdrelay_producer"), peer_dir))
    return None


def reply_params(transfer_id: str, address: str) -> dict[str, Any]:
    """What a producer's reply carries: give it to the consumer's request as it is."""
    return {
        "pdrelay_transfer_id": transfer_id,
        "do_remote_prefill": True,
        "pdrelay_producer": address,
    }


def _bad(key: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"kv_transfer_params: {key} {what}", "kv_transfer_params")


def _flag(params: Mapping[str, Any], key: str) -> bool:
    value = params.get(key, False)
    if not isinstance(value, bool):
        raise _bad(key, "must be true or false")
    return value


def _transfer_id(value: Any) -> str:
    if not isinstance(value, str) or _TRANSFER_ID.fullmatch(value) is None:
        raise _bad("pdrelay_transfer_id", "must be 1 to 128 letters, digits or _.:-")
    return value


def _producer(value: Any, peer_dir: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _bad("pdrelay_producer", "must be the producer's socket path")
    if not _is_direct_child(value, peer_dir):
        raise _bad("pdrelay_producer", "does not lie in the directory of this instance's peers")
    return value


def _is_direct_child(path: str, directory: str) -> bool:
    try:
        num_bytes = len(os.fsencode(path))
    except UnicodeEncodeError:
        return False
    if num_bytes > MAX_PATH_BYTES or not os.path.isabs(path):
        return False
    return os.path.dirname(os.path.realpath(path)) == os.path.realpath(directory)
