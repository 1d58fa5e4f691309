from __future__ import annotations

import asyncio
import os

import pytest

from pdrelay.launch.driver import last_line
from pdrelay.launch.log_pipe import LogPipe


async def pipe_of(*chunks: bytes) -> LogPipe:
    """All chunks written one by one, each seen by the loop, then the end."""
    read_end, write_end = os.pipe()
    lines: list[str] = []
    log = LogPipe(read_end, lines.append)
    log.lines = lines
    for chunk in chunks:
        os.write(write_end, chunk)
        await asyncio.sleep(0)
    os.close(write_end)
    log.close()  # takes the rest
    return log


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"a\nb\n"], ["a", "b"]),
        ([b"a", b"b\nc"], ["ab", "c"]),
        ([b"\xff\n"], ["\ufffd"]),
        ([b"\xe2\x82", b"\xac\n"], ["\u20ac"]),
        ([b"x\r\n\n"], ["x", ""]),
        ([], []),
    ],
)
async def test_lines(chunks, lines):
    assert (await pipe_of(*chunks)).lines == lines


async def test_endless_lines_are_cut_and_the_tail_is_bounded():
    log = await pipe_of(*[b"x" * 4096] * 4, b"\n", *[b"%d\n" % i for i in range(500)], b"\n")
    assert max(map(len, log.lines)) <= 8192
    assert len(log.tail) == 400
    assert last_line(log.tail) == "its last line: 499"


async def test_close_takes_what_is_there_while_the_writer_lives():
    read_end, write_end = os.pipe()
    lines: list[str] = []
    log = LogPipe(read_end, lines.append)
    os.write(write_end, b"last words")
    log.close()
    assert lines == ["last words"]
    os.close(write_end)
