"""Files of torch.save: against torch.load where they are honest, and inert where they are not."""

import argparse
import contextlib
import copyreg
import enum
import io
import os
import pickle
import pickletools
import random
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from megapoly.checkpoint import pickles
from megapoly.checkpoint.pickled import Global, Record, StoredTensor
from megapoly.checkpoint.torch_files import TorchFile
from megapoly.errors import CheckpointError

MAGIC, SYSTEM = 0x1950A86A20F9469CFC6C, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
OLD = {"_use_new_zipfile_serialization": False}


class Kind(enum.Enum):
    FIRST = 1


class Odd:
    def __init__(self):
        self.a = 3


class OddList(list):
    pass


def value():
    draw = torch.Generator().manual_seed(0)
    big = torch.randn(40, 30, generator=draw)
    state = torch.nn.Linear(3, 2).state_dict()
    return {
        "args": argparse.Namespace(num_layers=4, ratio=0.5, name="x", dtype=torch.bfloat16, kind=Kind.FIRST),
        "model": OrderedDict(a=big, view=big[3:7, 4:9], turned=big.t(), row=big[5], flat=big.view(-1)[7:100]),
        "linear": state,
        "kinds": [big.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.bool)],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "shape": big.shape,
        "plain": [1, -5, 2**70, 1.5, None, True, "ü", b"bytes", (1, (2, 3)), {4: 5}, {6, 7}, frozenset({8}), [[]]],
        "numpy": [np.float64(1.25), np.int32(7), np.bool_(True)],
        "odd": Odd(),
        "list": OddList([1, 2]),
        "array": np.arange(3),
    }


def leaves(found, expected, file):
    """Compare what we read with what torch.load gives; count the tensors."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, StoredTensor)
        seen = file.view(found)
        assert (seen.dtype, seen.shape) == (expected.dtype, expected.shape)
        assert torch.equal(seen, expected)
        return 1
    if isinstance(expected, argparse.Namespace):
        assert found.name == "argparse.Namespace"
        return leaves(found.fields, vars(expected), file)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        return sum(leaves(found[key], each, file) for key, each in expected.items())
    if isinstance(expected, Kind):
        assert (found.name, found.args) == (f"{__name__}.Kind", (1,))
    elif isinstance(expected, Odd):
        assert (found.name, found.fields) == (f"{__name__}.Odd", {"a": 3})
    elif isinstance(expected, OddList):
        assert (found.name, found.items) == (f"{__name__}.OddList", [1, 2])
    elif isinstance(expected, np.ndarray):
        assert found.name.startswith("numpy")
    elif isinstance(expected, (list, tuple)):
        assert type(found) is (list if isinstance(expected, list) else tuple)
        assert len(found) == len(expected)
        return sum(leaves(a, b, file) for a, b in zip(found, expected, strict=True))
    else:
        assert found == expected
        assert isinstance(found, torch.dtype) or type(found) in (
            str,
            bytes,
            int,
            float,
            bool,
            type(None),
            set,
            frozenset,
        )
    return 0


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_equals_torch_load(tmp_path, protocol, zipped):
    path = tmp_path / "file.pt"
    torch.save(value(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    file = TorchFile(path)
    assert leaves(file.value, torch.load(path, weights_only=False), file) == 15
    file.release()
    assert leaves(file.value, torch.load(path, weights_only=False), file) == 15


def test_a_tensor_is_a_view_of_the_map(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "file.pt")
    file = TorchFile(tmp_path / "file.pt")
    first, second = (file.view(file.value["a"]) for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


def stored(path, raw, storage=bytes(16)):
    """A file of torch with a pickle of our own, and one storage."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data.pkl", raw)
        archive.writestr("file/data/0", storage)
        archive.writestr("file/version", "3\n")
    return path


class Call:
    """Pickled as a call."""

    def __init__(self, *how):
        self.how = how

    def __reduce__(self):
        return self.how


def plain(value, protocol=2):
    """The instructions that push a value."""
    return pickle.dumps(value, protocol)[2:-1]


def malicious(flag):
    """Pickles that make the file ``flag`` when Python loads them, each in another way."""
    touch = f"mkdir {flag}"
    call = Call(os.system, (touch,))
    yield "REDUCE", pickle.dumps(call)
    for protocol in range(5):
        yield f"in a tree, protocol {protocol}", pickle.dumps({"args": [call], "model": {"a": (call,)}}, protocol)
    yield "INST", b"(S'%s'\nios\nsystem\n." % touch.encode()
    yield "OBJ", b"(cos\nsystem\nS'%s'\no." % touch.encode()
    yield "STACK_GLOBAL", b"\x80\x04\x8c\x02os\x8c\x06system\x93" + plain((touch,)) + b"R."
    yield "dotted STACK_GLOBAL", b"\x80\x04\x8c\x07zipfile\x8c\x09os.system\x93" + plain((touch,)) + b"R."
    yield "NEWOBJ", b"\x80\x02c%s\nMaker\n" % __name__.encode() + plain((str(flag),)) + b"\x81."
    yield "NEWOBJ_EX", b"\x80\x04c%s\nMaker\n" % __name__.encode() + plain(()) + plain({"path": str(flag)}) + b"\x92."
    yield "EXT1", b"\x80\x02\x82\x42" + plain((touch,)) + b"R."
    yield "EXT2", b"\x80\x02\x83\x42\x00" + plain((touch,)) + b"R."
    yield "BUILD", pickle.dumps(Call(Trap, (), str(flag)))
    yield "APPENDS", pickle.dumps(Call(TrapList, (), None, iter([str(flag)])))
    yield "SETITEMS", pickle.dumps(Call(TrapDict, (), None, None, iter([(str(flag), 1)])))
    yield "nested pickle", pickle.dumps(Call(pickle.loads, (pickle.dumps(call),)))
    yield "eval", pickle.dumps(Call(eval, (f"__import__('os').system({touch!r})",)))
    yield "args of a state", pickle.dumps(Call(argparse.Namespace, (), {"num_layers": call}))
    yield "torch's types", pickle.dumps(Call(torch._tensor._rebuild_from_type_v2, (os.system, Trap, (touch,), {})))
    yield "torch's parameters", pickle.dumps(Call(torch._utils._rebuild_parameter, (call, False, {})))
    yield "numpy", pickle.dumps(Call(np.ndarray, (call,)))
    yield "key", pickle.dumps(Call(OrderedDict, ([(call, 1)],)))
    yield "hash", b"\x80\x02}" + pickle.dumps(Call(Trap, (), str(flag)), 2)[2:-1] + b"K\x01s."


class Maker:
    def __new__(cls, path):
        os.mkdir(path)


class Trap:
    def __setstate__(self, state):
        os.mkdir(state)


class TrapList(list):
    def append(self, item):
        os.mkdir(item)

    def extend(self, items):
        self.append(items[0])


class TrapDict(dict):
    def __setitem__(self, key, item):
        os.mkdir(key)


def test_nothing_of_a_file_is_called(tmp_path):
    flag = tmp_path / "flag"
    copyreg.add_extension("os", "system", 0x42)
    try:
        for what, raw in malicious(flag):
            with contextlib.suppress(Exception):
                pickle.loads(raw)
            assert flag.exists(), f"{what} is harmless"
            flag.rmdir()
            with contextlib.suppress(CheckpointError):
                TorchFile(stored(tmp_path / "file.pt", raw))
            with contextlib.suppress(CheckpointError):
                (tmp_path / "old.pt").write_bytes(b"".join(map(pickle.dumps, (MAGIC, 1001, SYSTEM))) + raw)
                TorchFile(tmp_path / "old.pt")
            assert not flag.exists(), what
    finally:
        copyreg.remove_extension("os", "system", 0x42)


def test_unknown_classes_are_records():
    call = Call(os.system, ("x",))
    found, _ = pickles.load(io.BytesIO(pickle.dumps({"a": call, "b": Kind, "c": Call(Trap, (1,), {"d": 2})})))
    assert (found["a"].name, found["a"].args) == (f"{os.system.__module__}.system", ("x",))
    assert found["b"] == Global(f"{__name__}.Kind")
    assert (found["c"].args, found["c"].fields) == ((1,), {"d": 2})
    assert Record("x", state=(1, 2)).fields == {}


def storage_id(kind="FloatStorage", key="0", count=4, name="storage"):
    """Instructions of a persistent id."""
    return plain(name) + b"ctorch\n%s\n" % kind.encode() + plain(key) + plain("cpu") + plain(count)


def tensor(storage, offset=0, shape=(2, 2), stride=(2, 1), function="_rebuild_tensor_v2"):
    rest = plain(offset) + plain(shape) + plain(stride) + plain(False) + plain({})
    return b"\x80\x02ctorch._utils\n%s\n((" % function.encode() + storage + b"tQ" + rest + b"tR."


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (tensor(storage_id(), 1), "reaches element 4 of a storage of 4"),
        (tensor(storage_id(), 0, (2, 2), (3, 1)), "reaches element 4"),
        (tensor(storage_id(), -1), "no counts"),
        (tensor(storage_id(), 0, (-2, 2)), "no counts"),
        (tensor(storage_id(), 0, (2, 2), (-1, 1)), "no counts"),
        (tensor(storage_id(), 0, (2**40, 2**40), (0, 0)), "a tensor of shape"),
        (tensor(storage_id(), 0, (2,), (1, 1)), "no counts"),
        (tensor(storage_id(), True), "no counts"),
        (tensor(storage_id(count=5)), "has 16 bytes, expected 20"),
        (tensor(storage_id("DoubleStorage", count=2), 0, (2,), (2,)), "reaches element 2 of a storage of 2"),
        (tensor(storage_id(count=-4)), "no storage of torch"),
        (tensor(storage_id(count=2**63)), "no storage of torch"),
        (tensor(storage_id(key="1")), "file/data/1 is missing"),
        (tensor(storage_id(key="../data.pkl")), r"file/data/\.\./data\.pkl is missing"),
        (tensor(storage_id(name="module")), "no storage of torch"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "no storage of torch"),
        (b"Pa\n.", "no storage of torch"),
        (b"\x80\x02", "exhausted"),
        (b"\x80\x02K", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02(.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02K\x01R.", "damaged"),
        (b"\x80\x02K\x01K\x02b.", "is given a state"),
        (b"\x80\x02K\x01K\x02a.", "is added to a int"),
        (b"\x80\x02K\x01K\x02K\x03s.", "keys are set in a int"),
        (b"\x80\x02}]K\x03s.", "a list as a key"),
        (b"\x80\x02}(K\x03u.", "a key without a value"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01R.", "no tuple"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "else than pairs"),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
        (b"\x80\x02\x8a\xff\x01.", "damaged"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x02" + b")" + b"\x85" * 1000 + b"\x93.", "damaged"),
    ],
)
def test_impossible_pickles_are_refused(tmp_path, raw, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        TorchFile(stored(tmp_path / "file.pt", raw))
    assert "cannot be read as a file of torch.save" in str(caught.value)


def test_deep_nesting_and_repetition_take_no_room(tmp_path):
    deep = b"\x80\x02" + b")" + b"\x85" * 50_000 + b"."  # a tuple in a tuple in ...
    TorchFile(stored(tmp_path / "file.pt", deep))
    with pytest.raises(CheckpointError, match="as a key"):
        TorchFile(stored(tmp_path / "file.pt", b"\x80\x02}" + deep[2:-1] + b"K\x01s."))
    chain = b"ctorch._tensor\n_rebuild_from_type_v2\n" * 5000 + b")" + b"NN\x87" * 4999
    with pytest.raises(CheckpointError):
        TorchFile(stored(tmp_path / "file.pt", b"\x80\x02" + chain + b"R."))
    doubled = b"\x80\x02]" + b"q\x00h\x00\x86" * 3000 + b"."  # 2 ** 3000 leaves
    TorchFile(stored(tmp_path / "file.pt", doubled))


def test_what_torch_does_not_write_is_refused(tmp_path):
    path = tmp_path / "file.pt"

    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            TorchFile(path)

    refused("No such file")
    path.write_bytes(b"")
    refused("cannot mmap an empty file")
    path.write_bytes(b"nonsense" * 100)
    refused("its pickle is damaged")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused("does not begin as one")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("file/data.pkl", pickle.dumps(1) + bytes(1000))
    refused("is compressed or encrypted")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", "x")
    refused(r"has no data\.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data.pkl", pickle.dumps(1))
        archive.writestr("file/byteorder", "big")
    refused("not little-endian")
    path.write_bytes(b"".join(map(pickle.dumps, (MAGIC, 1001, {**SYSTEM, "little_endian": False}))))
    refused("not little-endian")


def test_a_damaged_storage_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"a": torch.ones(1000), "b": torch.full((1000,), 2.0)}, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(torch.full((1000,), 2.0).numpy().tobytes()) + 1999] ^= 1
    path.write_bytes(raw)
    file = TorchFile(path)
    assert file.view(file.value["a"]).eq(1).all()
    with pytest.raises(CheckpointError, match="storage 1, have the CRC-32"):
        file.view(file.value["b"])


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(9)}, tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    file = TorchFile(tmp_path / "file.pt")
    assert file.view(file.value["a"]).tolist() == list(range(9))


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_and_flipped_files_are_refused_or_read(tmp_path, zipped):
    """Whatever the damage: our exception, or a value; of a zip the values too, since they have checksums."""
    whole = tmp_path / "whole.pt"
    torch.save({"args": argparse.Namespace(a=1, b="x"), "w": torch.arange(5.0)}, whole, **OLD if not zipped else {})
    raw, draw = whole.read_bytes(), random.Random(3)
    refused = 0
    for number in range(400):
        damaged = bytearray(raw)
        if number % 3 == 0:
            del damaged[draw.randrange(len(raw)) :]
        for _ in range(draw.choice((1, 1, 2, 8)) if number % 3 else 0):
            damaged[draw.randrange(len(raw))] = draw.randrange(256)
        path = tmp_path / "file.pt"
        path.write_bytes(damaged)
        try:
            file = TorchFile(path)
            for each in file.value.values() if isinstance(file.value, dict) else ():
                if isinstance(each, StoredTensor):
                    assert file.view(each).numel() < 100
        except CheckpointError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("count", [1000, pytest.param(30_000, marks=pytest.mark.long)])
def test_edited_pickles_are_refused_or_read(tmp_path, count):
    """Instructions that are changed, left out, put in and repeated: ValueError, or a value."""
    raws = []
    for protocol in (2, 4):
        torch.save(value(), tmp_path / "file.pt", pickle_protocol=protocol)
        with zipfile.ZipFile(tmp_path / "file.pt") as archive:
            raws.append(archive.read("file/data.pkl"))
    draw, found = random.Random(0), {"read": 0, "refused": 0}
    for _ in range(count):
        try:
            pickles.load(io.BytesIO(edited(draw.choice(raws), draw)))
            found["read"] += 1
        except ValueError:
            found["refused"] += 1
    assert min(found.values()) > count // 100


def edited(raw, draw):
    """A pickle with a few edits."""
    raw = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, copied = draw.randrange(len(raw)), draw.randrange(len(raw))
        edit = draw.randrange(5)
        if edit == 0:
            raw[at] = draw.randrange(256)
        elif edit == 1:
            raw[at] ^= 1 << draw.randrange(8)
        elif edit == 2:
            raw[at : at + 1] = draw.choice(pickletools.opcodes).code.encode("latin-1")
        elif edit == 3:
            raw[at:at] = raw[copied : copied + draw.randrange(1, 40)]
        else:
            del raw[at : at + draw.randrange(1, 5)]
    return bytes(raw)
