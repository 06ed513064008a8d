"""Nothing that comes with a model runs as code: whatever asks for it is refused by name before anything is loaded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import evertune
from evertune.cli.plan.shape import shape_of
from evertune.drift.featurisers import FrozenEncoder
from evertune.lightning_modules import SequenceClassificationModule
from evertune.utils.files import sha256
from evertune.utils.pretrained import load_config, load_model, load_tokenizer
from tests.helpers.lightning_modules import tiny_bert

HARMFUL = "open({marker!r}, 'w').write('ran')\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Path(tiny_bert(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    module = SequenceClassificationModule(str(plain), classes=["business", "sport"])
    module.configure_model()
    module.save_pretrained(folder)
    return folder


@pytest.fixture
def foreign(plain, saved, tmp_path):
    """Copies of a folder with a change that an attacker made, hashes included."""

    def make(kind, change):
        folder = tmp_path / kind
        shutil.copytree({"plain": plain, "saved": saved}[kind], folder)
        (folder / "foreign.py").write_text(HARMFUL.format(marker=str(tmp_path / "ran")))
        change(folder)
        if kind == "saved":
            (folder / "foreign.py").unlink()
            manifest = json.loads((folder / "evertune.json").read_text())
            names = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
            manifest["sha256"] = {path.name: sha256(path) for path in names if path.name != "evertune.json"}
            (folder / "evertune.json").write_text(json.dumps(manifest))
        return folder

    yield make
    assert not (tmp_path / "ran").exists()


def edit(name, **entries):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


CODE = {
    "config": (
        edit("config.json", model_type="foreign", auto_map={"AutoConfig": "foreign.C", "AutoModel": "foreign.M"}),
        r"config.json names code to run \(auto_map: .*delete auto_map from the file",
    ),
    "a config of a kind that transformers has": (
        edit("config.json", auto_map={"AutoConfig": "foreign.C", "AutoModel": "foreign.M"}),
        r"config.json names code to run",
    ),
    "a config inside a config": (
        edit("config.json", text_config={"auto_map": {"AutoModel": "foreign.M"}}),
        r"config.json names code to run \(text_config.auto_map",
    ),
    "tokenizer": (
        edit("tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["foreign.T", None]}),
        r"tokenizer_config.json names code to run",
    ),
    "a tokenizer in the old form": (
        edit("tokenizer_config.json", auto_map=["foreign.T", None]),
        r"tokenizer_config.json names code to run",
    ),
    "attention": (
        edit("config.json", attn_implementation="somebody/attention"),
        r"config.json asks for attn_implementation='somebody/attention', which is code from the hub",
    ),
    "attention of a part": (
        edit("config.json", _attn_implementation={"text_config": "somebody/attention@main:forward"}),
        r"config.json asks for _attn_implementation=.*, which is code from the hub",
    ),
    "experts": (
        edit("config.json", experts_implementation="somebody/experts"),
        r"config.json asks for experts_implementation='somebody/experts'",
    ),
    "a config nested too deep": (
        lambda folder: (folder / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000),
        r"config.json is damaged: it is nested more than 100 levels deep",
    ),
}


def users(kind):
    """Everything that loads something from a folder."""
    if kind == "saved":

        def start(folder):
            SequenceClassificationModule(str(folder), classes=["business"]).start_from(folder)

        return [SequenceClassificationModule.from_pretrained, start]
    return [
        lambda folder: SequenceClassificationModule(str(folder), classes=["a"]).configure_model(),
        lambda folder: SequenceClassificationModule(str(folder), classes=["a"]).tokenizer,
        lambda folder: FrozenEncoder(str(folder)),
        lambda folder: shape_of({"model_name_or_path": str(folder)}, n_classes=2),
        lambda folder: load_config(str(folder)),
        lambda folder: load_model(str(folder)),
        lambda folder: load_tokenizer(str(folder)),
    ]


@pytest.mark.parametrize("kind", ["plain", "saved"])
@pytest.mark.parametrize("what", CODE)
def test_code_that_comes_with_a_model_is_refused(foreign, kind, what):
    change, message = CODE[what]
    folder = foreign(kind, change)
    for use in users(kind):
        with pytest.raises(ValueError, match=message):
            use(folder)


@pytest.mark.parametrize(
    "name", ["model.bin", "more/weights.PT", "foreign.py", "state.pkl", "tensors.npy", "native.so"]
)
def test_a_saved_module_holds_nothing_that_can_run(foreign, name):
    def add(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")

    folder = foreign("saved", add) if name != "foreign.py" else foreign("saved", lambda folder: None)
    if name == "foreign.py":
        (folder / name).write_text("")
    for use in users("saved"):
        with pytest.raises(ValueError, match=rf"{name} can run code when it is loaded.* Delete it, or use a copy"):
            use(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "more.safetensors"])
def test_a_file_added_to_a_saved_module_is_refused(saved, tmp_path, name):
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{name} is not listed in evertune.json: it was added later"):
        SequenceClassificationModule.from_pretrained(tmp_path / "copy")


def test_a_manifest_reads_no_file_outside_its_folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    manifest = json.loads((saved / "evertune.json").read_text())
    manifest["sha256"]["../secret"] = "0"
    (tmp_path / "copy/evertune.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"names a file outside its folder: '../secret'"):
        SequenceClassificationModule.from_pretrained(tmp_path / "copy")


def test_weights_that_are_a_pickle_are_refused_with_what_to_do(plain, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(plain, folder)
    weights = load_model(str(plain)).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    for use in (users("plain")[0], users("plain")[2]):
        with pytest.raises(ValueError, match=r"pytorch_model.bin are a pickle.*convert them once.*save_pretrained"):
            use(folder)
    shutil.copy(plain / "model.safetensors", folder)  # as many folders from the hub: the pickle is not read
    users("plain")[0](folder)


def test_a_model_is_saved_without_the_code_that_its_configuration_named(plain, tmp_path, monkeypatch):
    """From the hub, transformers' own class is used; the folder that is saved then names no other."""
    from evertune.utils import pretrained

    shutil.copytree(plain, tmp_path / "hub")
    edit("config.json", auto_map={"AutoModel": "foreign.M"})(tmp_path / "hub")
    monkeypatch.setattr(pretrained, "check_folder", lambda folder: None)  # a name on the hub is not a folder
    module = SequenceClassificationModule(str(tmp_path / "hub"), classes=["a"])
    module.configure_model()
    assert module.tokenizer.pad_token
    monkeypatch.undo()
    module.save_pretrained(tmp_path / "saved")
    assert SequenceClassificationModule.from_pretrained(tmp_path / "saved").classes == ["a"]


def test_transformers_loads_in_one_place():
    """No other module of ours loads from transformers, where it would have to remember all of this."""
    pattern = re.compile(r"Auto(Config|Model\w*|Tokenizer)\.from_pretrained\(")
    sources = {path: path.read_text() for path in Path(evertune.__file__).parent.rglob("*.py")}
    assert [path.stem for path, text in sources.items() if pattern.search(text)] == ["pretrained"]
