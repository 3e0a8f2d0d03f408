"""The picture of a run, and the metrics it is drawn from."""

import json
from pathlib import Path

import pytest

from titans_scale.evaluation.curves import plot_run, read_metrics

PNG = b"\x89PNG\r\n\x1a\n"


def write_metrics(folder: Path, *, memory: bool = True, end: str = "") -> Path:
    lines = []
    for step in range(1, 11):
        record = {"step": step, "loss_metrics/global_avg_loss": 5 / step, "grad_norm": 1.0, "lr": 1e-3, "n_tokens_seen": 100 * step}
        if step % 5 == 0:
            record["validation_metrics/loss"] = 6 / step
            if memory:
                record |= {"titans/inner_loss_before": 1.0, "titans/inner_loss_after": 0.5, "titans/theta_mean": 0.1}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + end)
    return folder / "metrics.jsonl"


@pytest.mark.parametrize("memory", [True, False])
def test_a_run_is_drawn_into_a_png_and_nothing_else_is_left(tmp_path, memory):
    records = read_metrics(write_metrics(tmp_path, memory=memory))
    plot_run(records, tmp_path / "pictures" / "curves.png", title="a run")
    assert (tmp_path / "pictures" / "curves.png").read_bytes().startswith(PNG)
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["curves.png"]


def test_a_single_step_is_enough_for_a_picture(tmp_path):
    plot_run({1: {"loss_metrics/global_avg_loss": 3.0}}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_a_run_folder_and_its_file_give_the_same_metrics(tmp_path):
    file = write_metrics(tmp_path)
    assert read_metrics(tmp_path) == read_metrics(file)
    assert list(read_metrics(file)) == list(range(1, 11))


def test_a_line_still_being_written_does_not_count(tmp_path):
    assert list(read_metrics(write_metrics(tmp_path, end='{"step": 11, "lo'))) == list(range(1, 11))


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    file = write_metrics(tmp_path, end='oops\n{"step": 12}\n')
    with pytest.raises(ValueError, match=r"line 11 of .*metrics\.jsonl"):
        read_metrics(file)


def test_a_step_written_twice_counts_with_its_last_values(tmp_path):
    file = write_metrics(tmp_path, end='{"step": 10, "lr": 7.0}\n')
    assert read_metrics(file)[10]["lr"] == 7.0


@pytest.mark.parametrize(("content", "sentence"), [(None, "does not exist"), ("", "holds no metrics yet")])
def test_missing_metrics_are_explained(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_metrics(tmp_path)
