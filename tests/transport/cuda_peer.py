"""A consumer on a GPU, in a process of its own: what tests talk to over a socket.

Run as `python cuda_peer.py FD ORDINAL`; messages are frames of `fd_messages`.
"""

from __future__ import annotations

import socket
import sys

import msgspec

from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.base import Arrived
from pdrelay.transport.checksum import checksum
from pdrelay.transport.cuda.pages import CudaPages
from pdrelay.transport.fds import recv_with_fds, send_with_fds
from pdrelay.transport.registry import TransportOptions, create_transport


def main():
    peer = socket.socket(fileno=int(sys.argv[1]))
    peer.settimeout(60)
    name, layout = msgspec.msgpack.decode(recv_with_fds(peer)[0], type=tuple[str, KVLayout])
    pages = CudaPages.create(layout, int(sys.argv[2]))
    pages.tensor.fill_(-1.0)
    transport = create_transport(name, pages, "decode-0", TransportOptions())
    descriptor = transport.descriptor()
    send_with_fds(peer, descriptor.data, descriptor.fds)
    while True:
        message = msgspec.msgpack.decode(recv_with_fds(peer)[0])
        answer = True
        match message:
            case ["expect", transfer_id, blocks, keys]:
                transport.expect(transfer_id, 0, blocks, keys)
            case ["commit", transfer_id, num_pages]:
                transport.commit(transfer_id, num_pages)
                news = []
                while not news:
                    news = transport.poll()
                answer = isinstance(news[0], Arrived)
            case ["checksum", blocks]:
                answer = checksum(pages, blocks, "full")
            case ["untouched", blocks]:
                answer = bool((pages.tensor[:, blocks] == -1.0).all())
            case ["quit"]:
                transport.close()
                pages.close()
                return
        send_with_fds(peer, msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main()
