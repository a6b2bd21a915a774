"""The recipe for Fashion-MNIST: its table, and that it runs on the data set's own split."""

import json

import pytest

from nfscale.datasets.fashion_mnist import FashionMnist
from nfscale.errors import CallerError
from pipelines.fashion_mnist import PUBLISHED, main, table


def test_the_table_has_what_was_found_and_what_is_published():
    readers = {"mlp": {"accuracy": 0.8712, "interval": [0.86, 0.88]}}
    lines = table({"fields": 1000, "tested": 143, "readers": readers}).splitlines()
    assert lines[2] == "| mlp | 87.1 % (86.0 to 88.0) | here | 857 train, 143 test |"
    assert len(lines) == 3 + len(PUBLISHED)
    assert all(0 < one.percent < 100 and one.source and one.differs for one in PUBLISHED)


@pytest.mark.slow
def test_it_runs(tmp_path):
    try:
        FashionMnist().open()
    except CallerError as error:
        pytest.skip(f"the images cannot be had here: {error}")
    output = tmp_path / "run"
    given = ["--limit", "500", "--epochs", "0.3", "--output", str(output), "workers=0", "track.enabled=false"]
    figures = main(given)
    assert json.loads((output / "fashion_mnist.json").read_text()) == figures
    assert figures["fields"] == 500
    assert 40 < figures["tested"] < 110
    assert list(figures["readers"]) == ["mlp", "probe", "pixels"]
    assert figures["readers"]["pixels"]["accuracy"] > 0.4
