"""Files that stay whole, and JSON files."""

import pytest

from est_cli.files import read_json, replacing, write_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    with replacing(file) as partial:
        write_json(partial, {"a": 1})
        assert not file.exists()
    with pytest.raises(OSError, match="disk full"), replacing(file) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert file.read_bytes() == b'{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", [None, b"", b'{"a": ', b"[1]", b"\xff"])
def test_what_holds_no_json_object_reads_as_an_empty_one(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == {}
