"""Whole or not at all."""

import json

import pytest

from fm_policy.files import new_folder, write_json


def test_a_folder_appears_when_it_is_complete(tmp_path):
    folder = tmp_path / "new" / "folder"
    with new_folder(folder) as draft:
        (draft / "file").write_text("content")
        assert not folder.exists()
    assert (folder / "file").read_text() == "content"
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def broken() -> None:
        with new_folder(tmp_path / "folder") as draft:
            (draft / "file").write_text("content")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_kept(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "folder") as draft:
        (draft / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "new" / "record.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in file.parent.iterdir()] == ["record.json"]
