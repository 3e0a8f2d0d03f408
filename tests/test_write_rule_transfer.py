"""The studies of the write rules: the recorded numbers are what the docs say, and a small run of the headline is repeated."""

import importlib.util
from pathlib import Path

import pytest

from titans_scale.config import MemoryConfig
from titans_scale.evaluation.write_rules.report import table
from titans_scale.evaluation.write_rules.studies import STUDIES, read_study
from titans_scale.evaluation.write_rules.training import Recipe, Text, byte_model, loss_with, train

ROOT = Path(__file__).parent.parent
PAGES = {"transfer": "memory.md", "rules": "stability.md", "long": "stability.md"}


def recorded(study):
    return read_study(ROOT / "docs" / "assets" / f"write_rules_{study}.json")


@pytest.fixture(scope="module")
def text():
    return Text()


@pytest.mark.parametrize("study", STUDIES)
def test_the_docs_show_the_recorded_table(study):
    assert table(study, recorded(study)) in (ROOT / "docs" / PAGES[study]).read_text()


def test_in_the_recorded_run_online_keeps_its_loss_at_every_chunk_size():
    losses = recorded("transfer")["online, 1 pass"]["held_out_loss"]
    assert list(losses) == ["1", "8", "16", "64", "256", "256, 2 passes"]
    change = {chunk: abs(loss / losses["64"] - 1) for chunk, loss in losses.items()}
    assert 0.01 < change.pop("256") < 0.011  # one pass goes less far in a chunk of 256; the page says so
    assert max(change.values()) < 0.001


def test_the_recorded_long_run_went_through_and_learned():
    row = recorded("long")["defaults, depth 4"]
    assert (row["steps"], row["stopped"]) == (2000, None)
    assert row["train_loss"] < 0.5 * row["curves"]["loss"][0]


def test_a_run_that_diverges_stops_and_says_so(text):
    """The paper's rule at the default step: 2 theta C / (1 - eta) = 26 where 2 is the limit (docs/stability.md)."""
    memory = MemoryConfig(num_heads=2, write_rule="plain", max_inner_grad_norm=None)
    run = train(byte_model(memory, dim=64, num_layers=2), text, Recipe(steps=5, batch_size=2, length=512))
    assert run.stopped in {f"loss not finite at step {step}" for step in range(1, 6)}
    assert run.summary()["steps"] == len(run.losses) < 5


def test_the_tool_draws_what_is_recorded_and_names_an_unknown_case(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("compare_write_rules", ROOT / "tools" / "compare_write_rules.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.main(["transfer", "--draw", "--output", str(tmp_path)]) == 2
    (tmp_path / "write_rules_transfer.json").write_text((ROOT / "docs/assets/write_rules_transfer.json").read_text())
    assert tool.main(["transfer", "--draw", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "write_rules_transfer.png").stat().st_size > 5_000
    assert table("transfer", recorded("transfer")) in capsys.readouterr().out
    assert tool.main(["transfer", "--cases", "onlin"]) == 2
    assert "no case 'onlin'" in capsys.readouterr().err


@pytest.mark.slow
def test_trained_at_chunk_64_online_keeps_its_loss_at_chunks_of_1_and_256(text):
    run = train(byte_model(MemoryConfig(num_heads=2), dim=64, num_layers=2), text, Recipe(steps=60, batch_size=2, length=512))
    held_out = text.validation(4, 512)
    losses = {chunk: loss_with(run.model, held_out, MemoryConfig(num_heads=2, chunk_size=chunk)) for chunk in (1, 64, 256)}
    assert losses[64] < 3.2  # 5.5 at the start
    assert all(abs(loss / losses[64] - 1) < 0.01 for loss in losses.values()), losses
