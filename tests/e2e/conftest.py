import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from real_engine import save_tiny


@pytest.fixture(scope="module")
def saved_tiny(tmp_path_factory):
    """`tiny` with its weights as a directory that production engines load."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")
