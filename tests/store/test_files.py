"""Files appear whole, and of several writers one wins."""

from concurrent.futures import ThreadPoolExecutor

from nfscale.store import files


def test_the_first_of_many_writers_wins(tmp_path):
    def put(number):
        return [files.put_if_absent(tmp_path / f"{key}", f"{number}".encode()) for key in range(50)]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(put, range(8)))
    for key in range(50):
        winners = [number for number in range(8) if won[number][key]]
        assert [f"{w}" for w in winners] == [(tmp_path / f"{key}").read_text()]
    assert len(list(tmp_path.iterdir())) == 50, "no temporary file is left"


def test_replace_leaves_the_old_content_or_the_new(tmp_path):
    path = tmp_path / "below" / "file"
    files.replace(path, b"old")
    files.replace(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
