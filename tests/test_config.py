"""The configuration: what a user may write, and what they are told when it cannot work."""

import ast
import dataclasses
import inspect
import re

import pytest
import yaml

from titans_scale import config as config_module
from titans_scale.config import (
    ConfigError,
    TitansConfig,
    config_differences,
    config_parser,
    config_to_dict,
    load_config,
    parse_config,
    save_config,
)

SECTIONS = [value for value in vars(config_module).values() if dataclasses.is_dataclass(value)]


def field_documents(section: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, white space collapsed."""
    (class_node,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(class_node, ast.ClassDef)
    documents = {}
    for field, below in zip(class_node.body, class_node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            assert isinstance(below.value, ast.Constant)
            documents[field.target.id] = " ".join(str(below.value.value).split())
    return documents


def leaf_fields(section: type, prefix: str = ""):
    """(dotted key, document, default) of every scalar setting."""
    for field in dataclasses.fields(section):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from leaf_fields(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field_documents(section)[field.name], field.default


def yaml_file(tmp_path, text: str):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("section", [section for section in SECTIONS if section is not TitansConfig], ids=lambda section: section.__name__)
def test_every_field_has_its_meaning_written_under_it(section):
    documented = field_documents(section)
    undocumented = [f.name for f in dataclasses.fields(section) if not dataclasses.is_dataclass(f.type) and f.name not in documented]
    assert undocumented == []


def test_help_shows_the_meaning_and_the_default_of_every_field(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    shown = " ".join(config_parser(prog="train").format_help().split())
    for key, document, default in leaf_fields(TitansConfig):
        shown_default = re.escape("null" if default is None else str(default))
        entry = rf"--{re.escape(key)} \S+(, --{re.escape(key)}\+ \S+)? {re.escape(document)} \(type: .{{1,60}}, default: {shown_default}\)"
        assert re.search(entry, shown), key


def test_print_config_prints_a_file_that_gives_the_same_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(config_parser(prog="train"), ["--model.dim=512", "--optimizer.betas=[0.8,0.9]", "--print_config"])
    assert stop.value.code == 0
    printed = yaml_file(tmp_path, capsys.readouterr().out)
    assert load_config(printed) == load_config(None, ["model.dim=512", "optimizer.betas=[0.8,0.9]"])


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = yaml_file(tmp_path, "model:\n  dim: 128\n  memory:\n    chunk_size: 32\n    depth: 3\n")
    config = load_config(path, ["model.dim=192", "model.memory.chunk_size=16"])
    assert (config.model.dim, config.model.memory.chunk_size, config.model.memory.depth) == (192, 16, 3)
    assert config.model.num_layers == TitansConfig().model.num_layers


@pytest.mark.parametrize("written", ["3e-3", "0.003", "3.0e-3"])
def test_a_number_may_be_written_with_or_without_a_point(tmp_path, written):
    path = yaml_file(tmp_path, f"optimizer:\n  lr: {written}\n")
    assert load_config(path).optimizer.lr == load_config(None, [f"optimizer.lr={written}"]).optimizer.lr == 0.003


def test_saved_and_loaded_again_nothing_has_changed(tmp_path):
    config = load_config(None, ["model.variant=lmm", "model.mlp_dim=320", "optimizer.betas=[0.8,0.9]", "optimizer.eps=1e-9"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config_to_dict(config)


def test_differences_name_the_dotted_keys_and_both_values():
    ours, theirs = load_config(None, ["model.dim=128"]), load_config(None, ["model.memory.depth=1"])
    assert config_differences(ours, theirs) == {"model.dim": (128, 256), "model.memory.depth": (2, 1)}
    assert config_differences(ours, ours) == {}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.dimm", "model.dim"),
        ("model.memory.chunk_sise", "model.memory.chunk_size"),
        ("optimiser.lr", "optimizer.lr"),
        ("training.step", "training.steps"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(tmp_path, key, nearest):
    with pytest.raises(ConfigError, match=rf"unknown key '{key}' on the command line; did you mean '{nearest}'\?"):
        load_config(None, [f"{key}=1"])
    section, _, leaf = key.rpartition(".")
    nested = leaf + ": 1"
    for name in reversed(section.split(".")):
        nested = f"{name}:\n" + "\n".join(f"  {line}" for line in nested.splitlines())
    with pytest.raises(ConfigError, match=rf"unknown key '{key}' in .*run\.yaml; did you mean '{nearest}'\?"):
        load_config(yaml_file(tmp_path, nested))


def test_a_key_like_no_other_points_to_help():
    with pytest.raises(ConfigError, match=r"unknown key 'zzz\.qqq' on the command line; --help lists every key"):
        load_config(None, ["zzz.qqq=1"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.num_heads=7", "model.dim 256 does not divide by model.num_heads 7; the nearest model.num_heads that does: 8"),
        ("model.num_heads=256", "rotary embeddings need an even"),
        ("model.memory.num_heads=3", "model.dim 256 does not divide by model.memory.num_heads 3"),
        ("model.memory.depth=0", "model.memory.depth is 0; a memory needs at least one layer"),
        ("model.memory.max_step=0", "model.memory.max_step is 0.0; it must be positive"),
        ("training.global_batch_tokens=5000", "is not a multiple of sequence_length 1024 .* the nearest that is: 4096"),
        ("lr_scheduler.min_ratio=1.5", "lr_scheduler.min_ratio is 1.5; it must lie between 0 and 1"),
        ("model.dim=wide", "model.dim.*wide"),
        ("training.dtype=float16", "training.dtype.*float16"),
        ("optimizer.lr=-0.1", "optimizer.lr is -0.1; it must be positive"),
        ("optimizer.betas=[0.9,1.0]", r"optimizer.betas are \(0.9, 1.0\); each must be at least 0 and below 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas.*2 elements"),
        ("model.dim", "override 'model.dim' has no value; write it as section.key=value"),
    ],
)
def test_a_value_that_cannot_work_is_told_in_one_sentence(override, told):
    with pytest.raises(ConfigError, match=told) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- 1\n- 2\n", "run.yaml holds a list; a configuration is a mapping of sections"),
        ("model: [\n", "run.yaml is not valid YAML"),
        ("", "run.yaml is empty; leave --config out"),
        ("model:\n", "section 'model' in .*run.yaml is no mapping"),
        ("model:\n  memory: 3\n", "section 'model.memory' in .*run.yaml is no mapping"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, told):
    with pytest.raises(ConfigError, match=told) as error:
        load_config(yaml_file(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist; the presets are in configs/"):
        load_config(tmp_path / "absent.yaml")


def test_lmm_needs_no_attention_heads():
    assert load_config(None, ["model.variant=lmm", "model.num_heads=7"]).model.num_heads == 7


def test_a_tool_may_add_options_of_its_own():
    parser = config_parser(prog="tool")
    parser.add_argument("--world", type=int, default=1, help="Ranks.")
    config, options = parse_config(parser, ["--world=8", "--model.dim=128"])
    assert (options.world, config.model.dim) == (8, 128)
