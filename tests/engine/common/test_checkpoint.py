"""Files of a checkpoint folder: found, refused, and written whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anabranch.common.checkpoint import Checkpoint, read_json, write_json, write_safetensors

A, B = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)


def shards(folder: Path) -> None:
    save_file({"a": A}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": B}, folder / "model-00002-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": names})


def test_tensors_are_found_in_one_file_and_in_shards(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write_safetensors(tmp_path / "one" / "model.safetensors", {"a": A, "b": B})
    shards(tmp_path / "two")
    for folder in (tmp_path / "one", tmp_path / "two"):
        checkpoint = Checkpoint(folder)
        assert checkpoint.shapes == {"a": [2, 3], "b": [4]}
        assert checkpoint.dtypes == {"a": "F32", "b": "BF16"}
        assert torch.equal(checkpoint.read("a"), A)
        assert torch.equal(checkpoint.read("b"), B)


def test_views_of_one_tensor_are_written_as_what_they_show(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"top": A[:1], "rest": A[1:], "column": A[:, 1]})
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("rest"), A[1:])
    assert torch.equal(checkpoint.read("column"), A[:, 1])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not there: \['model-00002-of-00002.safetensors'\]"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_a_pickle_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / name)
    with pytest.raises(ValueError, match=f"as pickles \\({name}\\).*only safetensors are loaded"):
        Checkpoint(tmp_path)


def test_a_pickle_beside_safetensors_does_not_matter(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "pytorch_model.bin")
    write_safetensors(tmp_path / "model.safetensors", {"b": B})
    assert Checkpoint(tmp_path).shapes == {"b": [4]}


def test_folders_without_weights_or_config_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model folder at .*nowhere"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no model folder at .*nowhere"):
        read_json(tmp_path / "nowhere" / "config.json")
    with pytest.raises(ValueError, match=r"has no weights; expected model.safetensors or model.safetensors.index.json"):
        Checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"has no config.json; a model folder holds config.json and safetensors"):
        read_json(tmp_path / "config.json")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        read_json(tmp_path / "config.json")
    write_safetensors(tmp_path / "model.safetensors", {"a": A})
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        Checkpoint(tmp_path)


def test_written_json_is_whole_or_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "state.json", {"step": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "state.json", {"step": object()})
    assert read_json(tmp_path / "state.json") == {"step": 1}
