"""Where a report may be written."""

from pathlib import Path

from hf_quant.publish.page import MARK, why_not


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    assert why_not(tmp_path / "new.html") is None
    (tmp_path / "ours.html").write_text(f'<meta name="generator" content="{MARK}">')
    (tmp_path / "theirs.html").write_text('<meta name="generator" content="another program">')
    (tmp_path / "dangling.html").symlink_to(tmp_path / "nowhere")
    assert why_not(tmp_path / "ours.html") is None
    for taken in (tmp_path / "theirs.html", tmp_path, tmp_path / "dangling.html"):
        assert "is there already" in (why_not(taken) or "")
