"""torchvision's own Python without its compiled operators, which want CUDA: declares the two that
its import asks for."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch

_OURS = Path(__file__).resolve().parents[1]
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _LIBRARY.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

_real = PathFinder.find_spec("torchvision", [p for p in sys.path if Path(p).resolve() != _OURS])
__path__ = list(_real.submodule_search_locations)
__file__ = _real.origin
exec(compile(Path(__file__).read_text(), __file__, "exec"))
