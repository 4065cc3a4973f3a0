"""A run that nothing disturbs: what the others have to be like."""

from __future__ import annotations

import pytest

from tests.instruct import runs
from tests.instruct.runs import NEEDED, ROWS, go
from tests.instruct.server import Endpoint


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run without faults, one request at a time; answers that are cut off are answers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Endpoint(ROWS) as endpoint:
        path = runs.write(folder, endpoint.url)
        assert go(path, "--set", "endpoint.concurrency=1") == 0
        assert endpoint.total == len(endpoint.received) == NEEDED
        assert endpoint.most == 1
        assert endpoint.faults["cut"] > 1
    assert runs.lines(folder / "run") == {"job": 1, "ask": NEEDED, "answer": NEEDED}
    return runs.files(folder / "run")
