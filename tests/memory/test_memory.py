"""The replay memory: what it keeps, how it draws, and that nothing in its files can run code."""

import hashlib
import itertools
import json
import pickle
import struct
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch

from evertune.memory import Herding, MemoryView, Policy, ReplayMemory
from evertune.memory.arrow import SCHEMA
from evertune.memory.codec import decode, encode

POLICIES = ["reservoir", "class_balanced", "ring"]


def numbers(n, classes=3, start=0):
    return [{"x": torch.full((4,), float(i)), "label": f"class{i % classes}"} for i in range(start, start + n)]


def label(example):
    return example["label"]


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


EXAMPLE = {
    "text": "café 😀",
    "ids": list(range(100)),
    "big": [2**40] * 9,
    "floats": [0.1] * 20,
    "mixed": [1, 2.0, "3", None, True] * 3,
    "pair": (torch.randn(3, 4), 7),
    "scalar": torch.tensor(3),
    "half": torch.randn(5).bfloat16(),
    "mask": torch.tensor([True, False]),
    "view": torch.arange(12).reshape(3, 4).T,
    "empty": torch.empty(0, 3),
    "array": np.arange(6, dtype=">i2").reshape(2, 3),
    "words": np.array(["a", "bc"]),
    "number": np.float32(1.5),
    "raw": b"\x00\x01",
    "inf": float("inf"),
    "nothing": None,
    3: {"nested": []},
}


def test_codec_gives_back_what_it_got():
    assert same(decode(encode(EXAMPLE)), EXAMPLE)
    decoded = decode(encode(EXAMPLE))
    decoded["pair"][0].add_(1)  # writable, and its own
    assert same(decode(encode(EXAMPLE)), EXAMPLE)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (int, r"cannot store example, a builtins.type; replay stores tensors"),
        ({"a": [object()]}, r"cannot store example\['a'\]\[0\], a builtins.object"),
        ({"a": np.array([object()])}, r"cannot store example\['a'\], a numpy.ndarray"),
        ({(1, 2): 3}, "dict key of type tuple"),
        ((torch.eye(3).to_sparse(),), r"cannot store example\[0\], a torch.Tensor"),
    ],
)
def test_codec_refuses_by_name(bad, message):
    with pytest.raises(TypeError, match=message):
        encode(bad)


def test_codec_refuses_damaged_bytes():
    data = encode(EXAMPLE)
    for cut in (0, 3, 6, 30, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="not an encoded example"):
            decode(data[:cut])
    with pytest.raises(ValueError, match="magic"):
        decode(pickle.dumps({"a": 1}))


def raw(header, buffers=b""):
    """The bytes of an example with any description: what :func:`encode` would not write."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = b"EVX1" + struct.pack("<I", len(header)) + header
    return prefix + bytes(-len(prefix) % 16) + buffers


def deep(kind, levels):
    node = 1
    for _ in range(levels):
        node = [kind, [["a", node]] if kind == "dict" else [node]]
    return node


HOSTILE = {
    "2^31 numbers in no bytes": ["tensor", "torch.float32", [2**31], 0, 0],
    "2^31 numbers in 16 bytes": ["tensor", "torch.float32", [2**31], 0, 16],
    "2^31 numbers of numpy in no bytes": ["array", "<f4", [2**31], 0, 0],
    "a shape that overflows": ["tensor", "torch.float32", [0, 2**62, 2**62], 0, 0],
    "a size below zero": ["tensor", "torch.float32", [-1], 0, 16],
    "a size of numpy below zero": ["array", "<f4", [-1, 2], 0, 16],
    "a size that is not a number": ["tensor", "torch.float32", ["4"], 0, 16],
    "a size of true": ["tensor", "torch.float32", [True, 4], 0, 16],
    "another shape": ["tensor", "torch.float32", [5], 0, 16],
    "a buffer beyond the end": ["bytes", 0, 2**40],
    "a buffer before the start": ["bytes", -16, 16],
    "a buffer of negative length": ["bytes", 8, -8],
    "a buffer used many times": ["list", [["bytes", 0, 16]] * 1000],
    "an unknown type of torch": ["tensor", "torch.load", [4], 0, 16],
    "objects": ["array", "|O", [2], 0, 16],
    "a record type": ["array", "f4,i4", [2], 0, 16],
    "a huge subarray": ["array", "2147483647f4", [1], 0, 16],
    "strings of no length": ["array", "<U0", [2**31], 0, 0],
    "a scalar without bytes": ["scalar", "<f4", 0, 0],
    "an unknown kind": ["pickle", 0, 16],
    "an unknown object": ["object", 3, [None, None], {}],
    "a date that is none": ["object", "date", ["yesterday"], None],
    "days beyond time": ["object", "timedelta", [10**12, 0, 0], None],
    "a zone that is a path": ["object", "datetime", ["2024-01-01", 0, ["../../etc/passwd"]], None],
    "a number that is too large": b"1e999",
    "deep lists": deep("list", 60),
    "very deep lists": b'["list",[' * 100_000 + b"1" + b"]]" * 100_000,
    "deep dicts": deep("dict", 60),
    "not JSON": b"{",
    "not UTF-8": b'"\xff"',
    "a dict with a list for a key": ["dict", [[["a"], 1]]],
    "a dict of one": ["dict", [["a"]]],
    "nothing": [],
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_what_an_example_claims_is_compared_with_its_bytes(header):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="not an encoded example"):
            decode(raw(header, bytes(range(16))))
        assert tracemalloc.get_traced_memory()[1] < 2**26  # what a shape claims is never allocated
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("levels", "fits"), [(30, True), (31, False)])
def test_examples_are_nested_as_deep_as_they_can_be_read(levels, fits):
    for wrap in (lambda inner: [inner], lambda inner: {"a": inner}, lambda inner: (inner, torch.ones(1))):
        example = 1.5
        for _ in range(levels):
            example = wrap(example)
        if fits:
            assert same(decode(encode(example)), example)
        else:
            with pytest.raises(TypeError, match="nested more than 30 levels deep"):
                encode(example)


def resealed(folder, change):
    """Change the Arrow file of a saved memory and its checksum, as somebody who publishes one could."""
    (file,) = folder.glob("*.arrow")
    file.write_bytes(change(file.read_bytes()))
    manifest = folder / "memory.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}))


def offset(column, value):
    """Replaces the second offset of a column of two rows."""

    def change(data):
        rows = pa.ipc.open_file(data).read_all().column(column).cast(pa.large_binary()).to_pylist()
        old = struct.pack("<3q", 0, len(rows[0]), len(rows[0]) + len(rows[1]))
        assert data.count(old) == 1
        return data.replace(old, old[:8] + struct.pack("<q", value) + old[16:])

    return change


def column(name, values):
    """Replaces a column."""

    def change(data):
        table = pa.ipc.open_file(data).read_all()
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(values)) if at >= 0 else table.append_column(name, pa.array(values))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    return change


def settings(text):
    """Replaces the settings."""

    def change(data):
        table = pa.ipc.open_file(data).read_all().replace_schema_metadata({b"evertune": text.encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    return change


def written(**options):
    """The same rows, written by Arrow with other options."""

    def change(data):
        table = pa.ipc.open_file(data).read_all()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    return change


SETTINGS = {"format": "evertune-memory-1", "policy": "reservoir", "seed": 0, "seen": 2}
CHANGES = {
    "an offset beyond the ids": offset("id", 2**40),
    "an offset before the ids": offset("id", -8),
    "an offset beyond the data": offset("data", 2**40),
    "an offset before the data": offset("data", -8),
    "an offset out of order": offset("data", 10**6),
    "rows that are compressed": written(compression="zstd"),
    "older metadata, in which compression was hidden": written(metadata_version=pa.ipc.MetadataVersion.V4),
    "another type": column("priority", [1, 2]),
    "a column more": column("more", [1, 2]),
    "a row without an id": column("id", pa.array(["a", None], pa.large_string())),
    "a row without data": column("data", pa.array([None, None], pa.large_binary())),
    "settings that are not JSON": settings("{"),
    "settings that are deep": settings("[" * 100_000),
    "settings of another type": settings("[]"),
    "no settings": settings("{}"),
    "a count that is a text": settings(json.dumps(SETTINGS | {"seen": "2"})),
    "a seed that is too large": settings(json.dumps(SETTINGS)[:-1] + ', "seed": 1e400}'),
    "another format": settings(json.dumps(SETTINGS | {"format": "evertune-memory-9"})),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_memory_from_elsewhere_is_checked_before_it_is_read(tmp_path, change):
    memory = ReplayMemory(5)
    memory.update(["x", "y"], "e", ids=["a", "bb"])
    memory.save(tmp_path)
    resealed(tmp_path, change)
    mine = ReplayMemory(5)
    with pytest.raises(ValueError, match="is corrupt, or is not a replay memory of this version"):
        mine.load(tmp_path)
    assert len(mine) == 0
    if "offset" in str(change):
        (file,) = tmp_path.glob("*.arrow")
        with pytest.raises(ValueError, match="not the Arrow file of a memory"):
            MemoryView.open(file)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_rows_are_refused_before_they_are_unpacked(tmp_path, codec):
    """A file of 7 kB would unpack to 100 MB."""
    row = {"id": "a", "label": "b", "experience": "e", "priority": 0.5, "length": 1, "data": bytes(100_000_000)}
    table = pa.Table.from_pylist([row], SCHEMA)
    path = tmp_path / "memory.arrow"
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
        writer.write_table(table)
    usual, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counted)
    try:
        with pytest.raises(ValueError, match="its rows are compressed"):
            MemoryView.open(path)
    finally:
        pa.set_memory_pool(usual)
    assert counted.max_memory() < 1_000_000


def test_only_the_rows_that_were_checked_are_read(tmp_path):
    """The end of an Arrow file says where its rows are: it could point to others than those that were checked."""
    memory = ReplayMemory(5)
    memory.update(["x"], "e")
    memory.save(tmp_path)

    def hide_the_rows(data):
        empty = pa.BufferOutputStream()
        with pa.ipc.new_file(empty, SCHEMA):
            pass
        stream_ends = data.index(b"\xff\xff\xff\xff\0\0\0\0")
        ends = empty.getvalue().to_pybytes()
        return data[:stream_ends] + ends[ends.index(b"\xff\xff\xff\xff\0\0\0\0") :]

    resealed(tmp_path, hide_the_rows)
    with pytest.raises(ValueError, match="it holds 1 batches of rows, and its end says 0"):
        ReplayMemory(5).load(tmp_path)


@pytest.mark.parametrize("manifest", ["[" * 100_000, "[]", "{}", '{"file": 3, "sha256": "a"}', '{"a": 1e400}', "\xff"])
def test_a_manifest_from_elsewhere_is_checked(tmp_path, manifest):
    ReplayMemory(5).save(tmp_path)
    (tmp_path / "memory.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(ValueError, match=r"memory.json is corrupt or truncated"):
        ReplayMemory(5).load(tmp_path)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_budget_of_distinct_examples(policy):
    memory = ReplayMemory(10, policy)
    for update in range(3):
        memory.update(numbers(40, start=100 * update), str(update), labels=label)
        assert len(memory) == len(set(memory.ids)) == 10
    values = {memory[slot]["x"][0].item() for slot in range(10)}
    assert len(values) == 10
    assert memory.labels == [memory[slot]["label"] for slot in range(10)]


def test_reservoir_does_not_depend_on_how_the_stream_is_cut():
    whole, parts = ReplayMemory(12), ReplayMemory(12)
    ids = [f"id{i}" for i in range(90)]
    data = numbers(90)
    whole.update(data, "e", ids=ids)
    for start in (60, 0, 30):
        parts.update(data[start : start + 30], "e", ids=ids[start : start + 30])
    assert sorted(whole.ids) == sorted(parts.ids)


def test_reservoir_is_uniform():
    counts = np.zeros(20)
    for seed in range(400):
        memory = ReplayMemory(5, seed=seed)
        memory.update([{"x": i} for i in range(20)], "e")
        counts[[memory[slot]["x"] for slot in range(5)]] += 1
    expected = 400 * 5 / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001


def test_classes_share_the_room_and_small_ones_leave_theirs():
    memory = ReplayMemory(10, "class_balanced")
    data = [{"label": "rare"}] * 2 + [{"label": "a"}] * 50 + [{"label": "b"}] * 50
    memory.update([example | {"x": i} for i, example in enumerate(data)], "e", labels=label)
    assert memory.summary()["per_class"] == {"rare": 2, "a": 4, "b": 4}
    memory.update([{"x": i, "label": "c"} for i in range(50)], "f", labels=label)
    assert memory.summary() == {
        "size": 10,
        "capacity": 10,
        "per_experience": {"e": 7, "f": 3},
        "per_class": {"rare": 2, "a": 2, "b": 3, "c": 3},
    }


def test_ring_keeps_the_newest_of_each_class():
    memory = ReplayMemory(6, "ring")
    for start in (0, 30):
        memory.update(numbers(30, start=start), str(start), labels=label)
    assert sorted(memory[slot]["x"][0].item() for slot in range(6)) == [54, 55, 56, 57, 58, 59]


def test_herding_follows_the_class_mean():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator) + 1)
    memory = ReplayMemory(5, "herding")
    memory.update([{"x": i, "label": "a"} for i in range(60)], "e", labels=label, features=features)
    mean, chosen = features.mean(0), []
    for _ in range(5):  # the paper's greedy choice, spelled out
        distances = {i: (mean - features[[*chosen, i]].mean(0)).norm().item() for i in range(60) if i not in chosen}
        chosen.append(min(distances, key=distances.get))
    assert sorted(memory[slot]["x"] for slot in range(5)) == sorted(chosen)
    memory.update([{"x": i, "label": "b"} for i in range(60)], "f", labels=label, features=features)
    assert {memory[s]["x"] for s in range(5) if memory[s]["label"] == "a"} == set(chosen[:2])


def test_herding_and_balance_say_what_they_need():
    with pytest.raises(ValueError, match="'herding' needs features, one vector for every example"):
        ReplayMemory(5, Herding()).update(numbers(3), "e", labels=label)
    with pytest.raises(ValueError, match=r"'class_balanced' needs the class of every example; example 1 of .*'e'"):
        ReplayMemory(5, "class_balanced").update(numbers(3), "e", labels=["a", None, "b"])
    with pytest.raises(ValueError, match="got 2 labels for 3 examples"):
        ReplayMemory(5).update(numbers(3), "e", labels=["a", "b"])


def test_refuses_bad_settings():
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"memory_size must be positive, got {size}"):
            ReplayMemory(size)
    with pytest.raises(ValueError, match=r"policy must be one of .*'reservoir'.* got 'newest'"):
        ReplayMemory(1, "newest")
    with pytest.raises(ValueError, match="seed must not be negative, got -2"):
        ReplayMemory(1, seed=-2)


def test_a_policy_of_your_own():
    class Oldest(Policy):
        name = "oldest"

        def priority(self, id, arrival, seed):
            return arrival

    memory = ReplayMemory(3, Oldest())
    memory.update(numbers(10), "e")
    memory.update(numbers(10), "f")
    assert memory.ids == ["e:0", "e:1", "e:2"]


def test_only_what_is_kept_is_read():
    class Dataset:
        read = 0

        def __len__(self):
            return 10_000

        def __getitem__(self, index):
            self.read += 1
            return {"x": index}

    dataset = Dataset()
    ReplayMemory(20).update(dataset, "e")
    assert dataset.read == 20


def test_a_stream_is_kept_by_content():
    memory, again = ReplayMemory(8), ReplayMemory(8)
    memory.add(({"x": i} for i in range(500)), "e")
    again.add(({"x": i} for i in itertools.chain(range(499, -1, -1), range(500))), "e")
    assert sorted(memory.ids) == sorted(again.ids)


def test_the_newer_copy_replaces_the_older():
    memory = ReplayMemory(4)
    memory.update([{"v": 1}, {"v": 1}], "e", ids=["a", "b"])
    memory.update([{"v": 2}], "f", ids=["a"])
    assert {id: memory[slot]["v"] for slot, id in enumerate(memory.ids)} == {"a": 2, "b": 1}


def test_draws_pass_through_everything_and_do_not_depend_on_who_draws():
    memory = ReplayMemory(7)
    memory.update(numbers(50), "e")
    one = memory.draw(np.arange(70), update=1)
    for start in range(0, 70, 7):
        assert sorted(one[start : start + 7]) == list(range(7))
    assert one[:7].tolist() != one[7:14].tolist()
    by_rank = [memory.draw(np.arange(rank, 70, 2), update=1) for rank in range(2)]
    assert np.stack(by_rank, 1).ravel().tolist() == one.tolist()
    assert memory.draw(np.arange(70), update=2).tolist() != one.tolist()
    assert ReplayMemory(3).draw(np.arange(5), update=0).tolist() == []


@pytest.mark.parametrize("policy", POLICIES)
def test_save_and_load(tmp_path, policy):
    memory, twin = ReplayMemory(10, policy), ReplayMemory(10, policy)
    memory.update(numbers(30), "e", labels=label)
    for _ in range(2):
        memory.save(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".arrow", ".json"]
    twin.load(tmp_path)
    state = ReplayMemory(10, policy)
    state.load_state_dict(memory.state_dict())
    for each in (memory, twin, state):
        each.update(numbers(30, start=30), "f", labels=label)
    assert memory.ids == twin.ids == state.ids
    assert all(same(memory[slot], twin[slot]) for slot in range(10))
    small = ReplayMemory(4, policy)
    small.load(tmp_path)
    assert len(small) == 4


def test_an_empty_memory_is_saved_and_loaded(tmp_path):
    ReplayMemory(3).save(tmp_path)
    memory = ReplayMemory(3)
    memory.load(tmp_path)
    assert len(memory) == 0


def test_no_pickle(tmp_path):
    memory = ReplayMemory(5)
    memory.update(numbers(20), "e")
    torch.save(memory.state_dict(), tmp_path / "state.pt")
    ReplayMemory(5).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    memory.save(tmp_path / "kept")
    (arrow,) = (tmp_path / "kept").glob("*.arrow")
    for planted in (arrow, tmp_path / "kept" / "memory.json"):
        good = planted.read_bytes()
        planted.write_bytes(pickle.dumps(print))
        with pytest.raises(ValueError, match=f"{planted.name} is a pickle .* evertune never loads one"):
            ReplayMemory(5).load(tmp_path / "kept")
        planted.write_bytes(good)
    state = memory.state_dict()
    state["arrow"] = torch.frombuffer(bytearray(pickle.dumps(print)), dtype=torch.uint8)
    with pytest.raises(ValueError, match="checkpoint is a pickle"):
        ReplayMemory(5).load_state_dict(state)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_damaged_files_are_refused_by_name(tmp_path, keep):
    memory = ReplayMemory(5)
    memory.update(numbers(20), "e")
    memory.save(tmp_path)
    before = memory.ids
    for planted in tmp_path.iterdir():
        good = planted.read_bytes()
        planted.write_bytes(good[: keep if keep >= 0 else len(good) + keep])
        with pytest.raises(ValueError, match=f"{planted.name} is corrupt or truncated"):
            memory.load(tmp_path)
        planted.write_bytes(good)
    assert memory.ids == before
    with pytest.raises(FileNotFoundError):
        memory.load(tmp_path / "elsewhere")


def test_a_memory_filled_otherwise_is_refused(tmp_path):
    ReplayMemory(5, seed=3).save(tmp_path)
    with pytest.raises(ValueError, match="was filled with seed=3, this memory has seed=0"):
        ReplayMemory(5).load(tmp_path)
    with pytest.raises(ValueError, match="was filled with policy='reservoir', this memory has policy='ring'"):
        ReplayMemory(5, "ring", seed=3).load(tmp_path)


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    ReplayMemory(5).save(tmp_path)
    manifest = tmp_path / "memory.json"
    manifest.write_text(manifest.read_text().replace('"file": "', '"file": "../'))
    with pytest.raises(ValueError, match="outside its folder"):
        ReplayMemory(5).load(tmp_path)


def test_forget_erases_the_bytes():
    memory = ReplayMemory(20)
    data = [{"secret": f"the secret of person {i}"} for i in range(20)]
    memory.update(data, "e", ids=[f"p{i}" for i in range(20)])
    memory.update([], "f")
    assert memory.forget(["p3", "p7", "nobody"]) == 2
    assert len(memory) == 18
    assert not {"p3", "p7"} & set(memory.ids)
    files = list(memory.directory.glob("*"))
    assert files == [memory.path(memory.generation)]
    content = files[0].read_bytes()
    assert b'the secret of person 3"' not in content
    assert b'the secret of person 4"' in content
    assert memory.forget(["p3"]) == 0


def test_readers_on_other_files_are_not_disturbed():
    memory = ReplayMemory(5)
    memory.update(numbers(20), "e")
    view = MemoryView.open(memory.path(memory.generation))
    before = [view[slot]["x"][0].item() for slot in range(5)]
    for start in range(5):
        memory.update(numbers(20, start=start), f"f{start}")
    assert [view[slot]["x"][0].item() for slot in range(5)] == before
    with pytest.raises(IndexError, match="slot 5 of a memory that holds 5 examples"):
        view[5]


def test_the_working_folder_goes_with_the_memory(tmp_path):
    memory = ReplayMemory(5, directory=tmp_path / "work")
    memory.update(numbers(20), "e")
    assert memory.directory.parent == tmp_path / "work"
    del memory
    assert list((tmp_path / "work").iterdir()) == []
