"""The presets: the tables of the papers, number by number, and files that explain every key."""

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from titans_scale import load_config
from titans_scale.config import ModelConfig, TitansConfig
from titans_scale.models.plans import num_parameters

CONFIGS = Path(__file__).parent.parent / "configs"
VARIANTS = ("mac", "mag", "mal", "lmm")
# blocks, width, heads, peak learning rate, tokens: MIRAS table 5 and ATLAS table 7; the 400M is in neither, its row is ours.
ARCHITECTURE = {
    "170m": (12, 768, 16, 3e-3, 15e9),
    "340m": (24, 1024, 16, 1.5e-3, 15e9),
    "400m": (24, 1024, 16, 1.5e-3, 15e9),
    "760m": (24, 1536, 16, 1.25e-3, 30e9),
}
PRESETS = [(variant, size) for variant in VARIANTS for size in ARCHITECTURE]

every_preset = pytest.mark.parametrize(("variant", "size"), PRESETS, ids=[f"{variant}_{size}" for variant, size in PRESETS])


def preset_file(variant: str, size: str) -> Path:
    return CONFIGS / f"{variant}_{size}.yaml"


@cache
def preset(variant: str, size: str) -> TitansConfig:
    return load_config(preset_file(variant, size))


def dotted_keys(section: type, prefix: str = ""):
    """Every key a file can have, sections included."""
    for field in dataclasses.fields(section):
        yield f"{prefix}{field.name}"
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from dotted_keys(field.type, f"{prefix}{field.name}.")


def key_lines(text: str):
    """(dotted key, whether it has a comment beside it or right above) of every key of a file."""
    path: list[str] = []
    above = ""
    for line in text.splitlines():
        match = re.match(r"( *)([a-z_]+):", line)
        if match:
            path = [*path[: len(match[1]) // 2], match[2]]
            yield ".".join(path), "  # " in line or above.lstrip().startswith("# ")
        above = line


def test_there_are_these_sixteen_presets_and_no_other():
    assert sorted(CONFIGS.glob("*_*m.yaml")) == sorted(preset_file(*name) for name in PRESETS)


@every_preset
def test_the_numbers_are_those_of_the_tables(variant, size):
    config = preset(variant, size)
    blocks, width, heads, peak_lr, tokens = ARCHITECTURE[size]
    assert config.model.variant == variant
    assert (config.model.num_layers, config.model.dim, config.model.num_heads) == (blocks, width, heads)
    assert config.optimizer.lr == peak_lr
    assert config.training.global_batch_tokens == 128 * 4096 == 524_288
    assert config.training.steps * config.training.global_batch_tokens == pytest.approx(tokens, rel=1e-3)
    assert config.lr_scheduler.warmup_steps * config.training.global_batch_tokens == pytest.approx(1e9, rel=1e-3)


@every_preset
def test_the_recipe_is_the_papers(variant, size):
    config = preset(variant, size)
    assert config.training.sequence_length == 4096
    assert config.model.vocab_size == 32000
    assert config.lr_scheduler.name == "cosine"
    assert (config.optimizer.weight_decay, config.training.max_grad_norm) == (0.1, 1.0)
    assert config.model.memory.depth >= 2 and config.model.memory.momentum and config.model.memory.forgetting


@every_preset
def test_the_parameters_are_within_three_percent_of_the_name(variant, size):
    count = num_parameters(preset(variant, size).model)
    assert count == pytest.approx(int(size[:-1]) * 1e6, rel=0.03)
    assert f"{count / 1e6:.1f}M parameters" in preset_file(variant, size).read_text().splitlines()[0]


@every_preset
def test_every_key_stands_in_the_file_with_a_comment(variant, size):
    text = preset_file(variant, size).read_text()
    keys = dict(key_lines(text))
    assert set(keys) ^ set(dotted_keys(TitansConfig)) == set()
    assert [key for key, commented in keys.items() if not commented] == []


@every_preset
def test_a_batch_divides_over_one_two_or_four_nodes_of_eight(variant, size):
    training = preset(variant, size).training
    for ranks in (1, 8, 16, 32):
        assert training.global_batch_tokens % (training.sequence_length * training.micro_batch_size * ranks) == 0


@pytest.mark.parametrize("size", ARCHITECTURE)
def test_presets_of_one_size_differ_in_little_besides_the_variant(size):
    def settings(variant: str) -> dict[str, object]:
        config = preset(variant, size)
        return dataclasses.asdict(config.optimizer) | dataclasses.asdict(config.lr_scheduler) | dataclasses.asdict(config.model.memory)

    assert all(settings(variant) == settings("mac") for variant in VARIANTS)


def test_no_preset_leaves_the_width_of_the_mlp_to_the_default():
    assert all(preset(*name).model.mlp_dim != ModelConfig().mlp_dim for name in PRESETS)
