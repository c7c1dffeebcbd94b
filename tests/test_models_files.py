"""Where a model may come from: files, folders, the Hugging Face cache; and what is said when nothing is there."""

import json

import pytest

from shardplan.costmodel.model_config import load_model
from shardplan.hw_profiles.errors import InputError


def read(config, folder, name="config.json"):
    path = folder / name
    path.write_text(json.dumps(config))
    return load_model(path)


def test_a_file_a_folder_and_text_paths_name_the_model(tmp_path):
    folder = tmp_path / "My-Model"
    folder.mkdir()
    model = read({"model_type": "gpt2"}, folder)
    assert model.name == "My-Model"
    assert load_model(folder) == model == load_model(f"{folder}/config.json")
    assert load_model(str(folder)).source == str(folder / "config.json")
    assert read({"model_type": "gpt2"}, tmp_path, "small.json").name == "small"
    cache = tmp_path / "models--org--Some-Model" / "snapshots" / "0123abc"
    cache.mkdir(parents=True)
    assert read({"model_type": "gpt2"}, cache).name == "Some-Model"


def test_relative_paths_and_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('\ufeff{"model_type": "gpt2"}', encoding="utf-8")
    assert load_model("config.json").name == tmp_path.name
    assert load_model(".").hidden == 768
    (tmp_path / "tiny").mkdir()  # a preset wins over a folder; ./ asks for the folder
    assert load_model("tiny").hidden == 128
    with pytest.raises(InputError, match=r"tiny.*no config\.json"):
        load_model("./tiny")


def file_complaint(path) -> str:
    with pytest.raises(InputError) as error:
        load_model(path)
    message = str(error.value)
    assert "\n" not in message
    assert error.value.remedy
    return message


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.json", str(tmp_path / "none"), "none/config.json", "none.json"):
        message = file_complaint(path)
        assert message.startswith(f"{path}: no such file or folder; ")
        assert "config.json" in message
    assert "did you mean llama-3-8b" in file_complaint("meta-llama/lama-3-8b")
    assert "no config.json" in file_complaint(tmp_path)
    assert file_complaint(tmp_path).startswith(str(tmp_path))


@pytest.mark.parametrize("name", ["", " ", "a\0b", "x" * 5000, "~no-such-user/config.json"])
def test_names_that_cannot_be_a_path(name):
    assert "config.json" in file_complaint(name)


def test_cut_json_names_line_and_column(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 4096}, indent=2)[:-10])
    message = file_complaint(path)
    assert message.startswith(f"{path}: not valid JSON at line 3, column ")
    assert "cut short" in message


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b""])
def test_files_that_are_no_json_text(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert file_complaint(path).startswith(f"{path}: ")


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(20_000_000)
    assert "is larger than 10000000 bytes" in file_complaint(path)
