"""The connector's copies on an accelerator, on the fake device and, where there is one, a GPU."""

from __future__ import annotations

import pytest
from device_memory import SPLIT, TOGETHER, DeviceMemory
from hand_over_kit import BLOCK_SIZE, LAYERS, Kit, prompt_of

from pdrelay.errors import TransportError
from pdrelay.integrations.vllm.device_pages import DeviceKVPages, Region, layer_runs
from pdrelay.integrations.vllm.page_layout import LayerLayout, Plane
from pdrelay.integrations.vllm.pages import Move
from pdrelay.integrations.vllm.step import Chunk, StepPlan, prompt_digest
from pdrelay.transport.host_device import HostFabric

PROMPT = prompt_of(1, 14)
P_BLOCKS, D_BLOCKS = [9, 3, 4, 20], [60, 61, 50, 7]


class Rank(DeviceMemory):
    """Whose pages a peer opens."""

    def __init__(self, fabric: HostFabric, num_blocks: int, form: str, *, manual: bool) -> None:
        super().__init__(fabric, num_blocks, form, manual=manual)
        total = self.memory.layout.total_bytes
        region = Region(self.memory.address, self.memory.ipc_handle(), total, 0)
        self.bound = 0
        self.pages = DeviceKVPages(self.layout, self.device, [region], bind_thread=self.bind)

    def bind(self) -> None:
        self.bound += 1


class DeviceKit(Kit):
    """Kit over fake devices: kernels and copies run when `p.device` is told to."""

    def __init__(self, directory, form: str) -> None:
        fabric = HostFabric()
        self.p = Rank(fabric, 40, form, manual=True)
        self.d = Rank(fabric, 80, form, manual=False)
        super().__init__(directory)
        self.producer.close()
        self.producer = self.new_producer(pages=self.p.pages)
        self.new_consumer(pages=self.d.pages)

    def compute(self, blocks: list[int], stop: int, value: int) -> None:
        """Launch a step; nothing of it is complete on the device."""
        digest = prompt_digest(PROMPT)
        self.producer.begin_step(
            StepPlan(chunks=[Chunk("r", "T-r", len(PROMPT), digest, blocks, stop)])
        )
        for layer in range(LAYERS):
            ids = blocks[: -(-stop // BLOCK_SIZE)]
            self.p.device.launch(
                lambda layer=layer, ids=ids: self.p.write(layer, ids, value + layer)
            )
            self.layer_written(layer)
        self.producer.end_step()

    def arrived_values(self, value: int, blocks: list[int]) -> bool:
        return all((self.d.blocks(layer, blocks) == value + layer).all() for layer in range(LAYERS))


@pytest.fixture(params=[SPLIT, TOGETHER])
def kit(tmp_path, request):
    built = DeviceKit(tmp_path, request.param)
    yield built
    built.p.device.run()
    built.close()
    assert built.p.device.fabric.opened == []  # every mapping was closed


def ended(kit):
    side = kit.consumers[0]
    return side.take_finished(), side.take_failed_blocks()


def test_small_layers_share_a_submission(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.compute(P_BLOCKS, 8, 5)
    kit.compute(P_BLOCKS, 14, 5)
    assert kit.p.device.num_copies == 2  # one a step
    kit.p.device.run()
    assert kit.arrived_values(5, D_BLOCKS)


@pytest.mark.parametrize("batch_bytes", [0, 100, 1 << 30])
@pytest.mark.parametrize("late_by", [0, 1, 2], ids=["before", "between chunks", "after"])
def test_pages_are_equal_however_many_share_a_submission(kit, batch_bytes, late_by):
    kit.p.pages.batch_bytes = batch_bytes
    for i, stop in enumerate([8, 14, None]):
        if i == late_by:
            kit.load("r", PROMPT, D_BLOCKS)
            kit.pump()
        if stop is not None:
            kit.compute(P_BLOCKS, stop, 5)
    assert kit.p.device.num_copies >= 1
    kit.p.device.run()
    kit.pump()
    assert kit.arrived_values(5, D_BLOCKS)
    others = [block for block in range(80) if block not in D_BLOCKS]
    assert not any(kit.d.blocks(layer, others).any() for layer in range(LAYERS))
    assert ended(kit) == ({"r"}, set())


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2], [2, 0, 1]])
@pytest.mark.parametrize("in_grid", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_moves_of_any_layers_that_share_both_or_one_of_their_lists(kit, layers, in_grid, shared):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.compute(P_BLOCKS, 4, 1)
    kit.p.device.run()
    (writer,) = [link.writer for link in kit.producer._links.all]
    assert writer._grid is not None
    if not in_grid:
        writer._grid = None
    src, targets = [5, 2, 8], [[70, 30, 31], [40, 33, 34], [12, 13, 14]]
    if shared:
        targets = targets[:1] * 3
    for layer in layers:
        for i, block in enumerate(src):
            kit.p.write(layer, [block], 10 * layer + i + 1)
    writer.write([Move(layer, src, targets[i]) for i, layer in enumerate(layers)])
    kit.p.device.run()
    for layer, dst in zip(layers, targets, strict=False):
        for i, block in enumerate(dst):
            assert (kit.d.blocks(layer, [block]) == 10 * layer + i + 1).all()


def test_done_is_said_when_the_device_has_copied(kit):
    kit.p.pages.batch_bytes = 0  # every layer by itself, as large ones are
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.compute(P_BLOCKS, 14, 5)
    kit.hold("r")
    kit.pump()
    assert ended(kit) == (set(), set())
    kit.p.device.run_copies()
    assert not kit.d.array.any()  # copies wait for the kernels that write their source
    kit.p.device.run_compute(2)  # the first layer, and the event behind it
    kit.p.device.run_copies()
    assert (kit.d.blocks(0, D_BLOCKS) == 5).all()
    assert not kit.d.blocks(1, D_BLOCKS).any()
    kit.p.device.run()
    kit.pump()
    assert kit.arrived_values(5, D_BLOCKS)
    assert ended(kit) == ({"r"}, set())
    assert kit.producer.take_finished() == {"r"}


def test_late_announcement_waits_for_the_kernels_too(kit):
    kit.compute(P_BLOCKS, 14, 5)
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.p.device.run_copies()
    assert not kit.d.array.any()
    kit.p.device.run()
    kit.pump()
    assert kit.arrived_values(5, D_BLOCKS)
    assert ended(kit) == ({"r"}, set())


def test_abort_waits_for_the_device(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.compute(P_BLOCKS, 8, 5)
    kit.consumers[0].begin_step(StepPlan(cancelled=["r"]))
    kit.pump()
    assert ended(kit) == (set(), set())
    kit.p.device.run()
    kit.pump()
    assert ended(kit) == ({"r"}, set())


def test_a_consumer_that_dies_is_unmapped_behind_its_copies(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.compute(P_BLOCKS, 14, 5)
    kit.hold("r")
    kit.consumers[0].close()
    kit.producer.poll()
    assert len(kit.p.device.fabric.opened) == 1
    kit.p.device.run()
    kit.producer.poll()
    assert kit.p.device.fabric.opened == []
    assert kit.producer.take_finished() == {"r"}


def test_memory_is_opened_for_the_first_transfer_only(kit):
    """Not while an engine starts: it may be capturing graphs."""
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    assert kit.p.device.fabric.opened == []
    assert kit.p.bound == 0
    kit.compute(P_BLOCKS, 14, 5)
    assert len(kit.p.device.fabric.opened) == 1
    assert kit.p.bound > 0


def test_memory_that_cannot_be_opened_fails_the_load(kit):
    kit.p.device.fabric.shared.clear()
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.compute(P_BLOCKS, 14, 5)
    kit.hold("r")
    kit.pump()
    assert ended(kit) == ({"r"}, set(D_BLOCKS))


def test_runs_merge_where_blocks_touch_on_both_sides():
    touching = LayerLayout("l", 0, "f", (Plane(0, 8, 8), Plane(800, 8, 8)))
    apart = LayerLayout("l", 0, "f", (Plane(0, 32, 8), Plane(8, 32, 8)))
    runs = [(1, 11, 3), (9, 14, 1)]
    merged = layer_runs(touching, 1000, touching, 5000, runs)
    assert [(r.src, r.dst, r.num_bytes) for r in merged] == [
        *((1008, 5088, 24), (1072, 5112, 8)),
        *((1808, 5888, 24), (1872, 5912, 8)),
    ]
    single = layer_runs(touching, 0, apart, 0, runs)
    assert len(single) == 8
    assert (single[5].src, single[5].dst) == (816, 12 * 32 + 8)


@pytest.mark.parametrize(
    "handles", [[], [b"?"], [b"\x93\xc4\x01a\x05\x09"], [b"\x93\xc4\x01a\xcd\xff\xff\x00"] * 2]
)
def test_damaged_handles_are_refused(kit, handles):
    with pytest.raises(TransportError):
        kit.p.pages.open(kit.d.layout, handles, ())


def test_on_a_gpu_pages_move_between_processes():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from vllm_gpu_pages import move_between_processes

    move_between_processes()


def test_on_two_gpus_pages_move_by_nccl():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: NCCL refuses one for both ranks")
    from vllm_gpu_pages import move_between_processes

    move_between_processes("nccl", gpu=1)
