"""Files: whole or not at all, never through a link, and one line for what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glassarmor.interpret.storage import check_links, read_json, read_object, write_atomic


def test_writing_replaces_a_link_and_leaves_what_it_led_to(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("theirs")
    inside = tmp_path / "run"
    inside.mkdir()
    for name in ("card.json", ".card.json.part"):  # the file itself, and the one that is written first
        (inside / name).symlink_to(other)
    write_atomic(inside / "card.json", "ours")
    assert (inside / "card.json").read_text() == "ours"
    assert not (inside / "card.json").is_symlink()
    assert other.read_text() == "theirs"
    assert [path.name for path in inside.iterdir()] == ["card.json"]


@pytest.mark.parametrize("place", ["report", "report/data", "metrics.csv", "checkpoints/last.ckpt"])
def test_a_folder_whose_parts_lie_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(ValueError, match=rf"^resume: .*{link.name} is a link to .*outside.* outside"):
        check_links(tmp_path / "run", "resume")


def test_links_within_a_folder_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "run" / "report").mkdir(parents=True)
    (tmp_path / "run" / "latest").symlink_to(tmp_path / "run" / "report")
    check_links(tmp_path / "run", "resume")
    (tmp_path / "linked").symlink_to(tmp_path / "run")  # the folder itself may be reached by one
    check_links(tmp_path / "linked", "resume")
    check_links(tmp_path / "none", "resume")


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1', b"\xff\xfe\x00", b"[" * 200_000, b"null\x00", b'{"a": NaN,}', b"[1]", b'"text"', b"3"]
)
def test_what_is_cut_or_garbage_is_one_line_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^resume: {path}.* damaged$") as error:
        read_object(path, "resume")
    assert "\n" not in str(error.value)


def test_what_is_no_file_or_too_large_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"none\.json does not exist$"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="expected a file"):
        read_json(tmp_path)
    monkeypatch.setattr("glassarmor.interpret.storage.LARGEST", 1 << 20)
    (tmp_path / "large.json").write_text(json.dumps("a" * (1 << 21)))
    with pytest.raises(ValueError, match="at most 1 MiB, found 2 MiB"):
        read_json(tmp_path / "large.json")


def test_a_folder_that_is_a_link_out_of_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "analyses").mkdir()
    (tmp_path / "analyses" / "card").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"^name: .*card is a link to .*elsewhere"):
        check_links(tmp_path / "analyses" / "card", "name")


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"card\.json") as error:
        write_atomic(tmp_path / "none" / "card.json", "x")
    assert error.value.filename == str(tmp_path / "none" / "card.json")
