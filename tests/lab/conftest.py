from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import write_run

from pdrelay.lab.report.build import BuiltReport, build_report


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> Path:
    """A complete synthetic run of one repeat, without a report. Not to be changed."""
    root = tmp_path_factory.mktemp("run")
    write_run(root)
    return root


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> BuiltReport:
    """The report of a complete synthetic run."""
    root = tmp_path_factory.mktemp("built")
    write_run(root)
    return build_report(root)
