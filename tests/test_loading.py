"""kedit.load: any folder written by save_pretrained, and a sentence where it cannot be loaded."""

import json
import shutil

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import kedit
from kedit.errors import ArchitectureError, ConfigError
from tiny_models import MODEL_TYPES, tiny_model, tokenizer


@pytest.fixture
def folder(tmp_path):
    """A tiny model and its tokenizer on disk."""

    def save(model_type="gpt2", kind="plain", **options):
        tiny_model(model_type, **options).save_pretrained(tmp_path / "model")
        tokenizer(kind).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("kind", ["plain", "bos", "nopad"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_model_and_tokenizer_are_those_that_were_saved(folder, model_type, kind):
    path = folder(model_type, kind)
    model, tok = kedit.load(path)
    assert not model.training
    original = tiny_model(model_type).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    texts = ["Ada Lovelace works in 東京  now.", " a\tb", "x's -- 1984!"]
    assert tok(texts)["input_ids"] == tokenizer(kind)(texts)["input_ids"]
    assert tok.is_fast


def test_dtype_is_as_stored_or_as_asked(folder):
    path = folder(dtype=torch.bfloat16)
    assert kedit.load(path)[0].dtype == torch.bfloat16
    assert kedit.load(str(path), dtype=torch.float32)[0].dtype == torch.float32
    assert kedit.load(path, dtype="float64")[0].dtype == torch.float64


def test_nothing_there(tmp_path):
    with pytest.raises(ArchitectureError, match="save_pretrained"):
        kedit.load(tmp_path)
    with pytest.raises(ArchitectureError, match="no/such/folder/at/all"):
        kedit.load(tmp_path / "no/such/folder/at/all", local_files_only=True)


def test_paths_without_a_model(folder, tmp_path, monkeypatch):
    path = folder()
    monkeypatch.chdir(tmp_path)
    for name in ("/no/such", "./such", "../such", "~/such", "a/b/c", "such.gguf", "a/such.safetensors", "such/", ""):
        with pytest.raises(ArchitectureError, match="there is no such file or folder") as error:
            kedit.load(name)
        assert repr(name) in str(error.value)
    with pytest.raises(ArchitectureError, match="the folder holds no config.json; its subfolders model hold one"):
        kedit.load(tmp_path)
    assert kedit.load("model")[0].config.model_type == "gpt2"
    assert kedit.load(tmp_path, subfolder="model")[0].config.model_type == "gpt2"
    for file in ("model.safetensors", "config.json"):
        with pytest.raises(ArchitectureError, match="it is a single file"):
            kedit.load(path / file)
    (path / "config.json").unlink()
    with pytest.raises(ArchitectureError, match=r"holds no config.json \(found: .*model.safetensors"):
        kedit.load(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArchitectureError, match="the folder is empty"):
        kedit.load("empty")
    (tmp_path / "words.gguf").write_text("once upon a time")
    with pytest.raises(ArchitectureError, match="does not begin with the letters GGUF"):
        kedit.load("words.gguf")


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2-xl", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.1-8B"])
def test_names_on_the_hub(name, monkeypatch):
    asked = []
    monkeypatch.setattr("kedit.loading._model", lambda source, options: asked.append(source) or 1 / 0)
    with pytest.raises(ArchitectureError, match="Cannot load"):
        kedit.load(name, local_files_only=True)
    assert asked == [name]


def test_options_belong_to_a_named_model(folder):
    with pytest.raises(ConfigError, match="device_map, revision cannot be given for the embedded model"):
        kedit.load(revision="main", device_map="auto")
    assert kedit.load(folder(), device_map="cpu", attn_implementation="eager")[0].config._attn_implementation == "eager"


@pytest.mark.parametrize("damage", ["config", "weights", "truncated", "tokenizer", "no tokenizer", "type"])
def test_damaged_folders(folder, damage):
    path = folder()
    match damage:
        case "config":
            (path / "config.json").write_text("{")
        case "weights":
            (path / "model.safetensors").unlink()
        case "truncated":
            content = (path / "model.safetensors").read_bytes()
            (path / "model.safetensors").write_bytes(content[:1000])
        case "tokenizer":
            (path / "tokenizer.json").write_text("{}")
        case "no tokenizer":
            for file in path.glob("tokenizer*"):
                file.unlink()
        case "type":
            (path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ArchitectureError, match=r"Cannot load .*model"):
        kedit.load(path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("n_layer", 7, r"hold no weights for transformer\.h\.5\.\S+, .* more"),
        ("n_inner", 96, r"transformer\.h\.0\.mlp\.c_fc\.weight \(\(48, 112\) instead of \(48, 96\)\)"),
        ("vocab_size", 399, "transformer.wte.weight"),
        ("n_layer", "five", "n_layer|integer"),
        ("n_head", 0, "Cannot load"),
        ("activation_function", "nosuch", "nosuch"),
    ],
)
def test_config_that_the_weights_do_not_fit(folder, field, value, words):
    path = folder()
    config = json.loads((path / "config.json").read_text())
    assert field in config
    (path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ArchitectureError, match=words) as error:
        kedit.load(path)
    assert str(error.value).startswith("Cannot load")
    assert str(error.value).endswith(". Give a folder written by save_pretrained, or a name on the hub.")
    assert "\n" not in str(error.value)


def test_config_that_is_no_object(folder):
    path = folder()
    (path / "config.json").write_text("[]")
    with pytest.raises(ArchitectureError, match="Cannot load"):
        kedit.load(path)


@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
def test_real_checkpoint(test_data, name):
    model, tok = kedit.load(test_data / "models" / name)
    ids = tok("Once upon a time there was a little girl named", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = tok.decode(model(ids).logits[0, -1].argmax())
    assert said.strip() == {"stories260K": "Lily", "stories3M": "Lucy"}[name]


def test_qwen2_folder_keeps_the_tokenizer_its_file_describes(test_data, tmp_path):
    """AutoTokenizer goes by the type in config.json; it must not build another class than the file says."""
    tiny_model("qwen2").save_pretrained(tmp_path)
    for source, sample in [("tokenizers/qwen2", "Zoe\u0301 was born in 1984"), ("models/stories260K", "Once upon 12")]:
        for file in (test_data / source).iterdir():
            if file.name.startswith("tokenizer"):
                shutil.copy(file, tmp_path / file.name)
                (tmp_path / file.name).chmod(0o644)
        from tokenizers import Tokenizer

        expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(sample).ids
        assert kedit.load(tmp_path)[1](sample)["input_ids"] == expected


def test_an_encoder_decoder_is_called_so(tmp_path):
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match="is an encoder-decoder"):
        kedit.load(tmp_path)
