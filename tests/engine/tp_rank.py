"""One rank of a tensor-parallel test: python tp_rank.py RANK WORLD_SIZE DIRECTORY DTYPE"""

import sys

import numpy as np
import torch
from model_harness import Batcher, random_tokens, small_config

from pdrelay.engine.communicator import connect_ranks
from pdrelay.engine.models import build_model

if __name__ == "__main__":
    rank, world_size, directory, dtype = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3],
        sys.argv[4],
    )
    torch.set_num_threads(1)
    config = small_config()
    communicator = connect_ranks(
        rank=rank,
        world_size=world_size,
        path=f"{directory}/tp",
        timeout_s=30,
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
    )
    model = build_model(
        "small",
        config,
        load_format="dummy",
        dtype=getattr(torch, dtype),
        communicator=communicator,
    )
    batcher = Batcher(config, model, tp_size=world_size, dtype=dtype)
    sequence = batcher.sequence(random_tokens(40))
    batcher.step(chunks=[(sequence, 30)])
    for _ in range(10):
        batcher.step(decodes=[sequence])
    np.save(f"{directory}/{rank}.npy", batcher.logits_of(sequence).numpy())
    communicator.barrier()
    communicator.close()
