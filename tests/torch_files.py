"""Torch files written without torch, for the tests: pickles with its instructions, both formats, whole or wrong."""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict


class Storage:
    """Pickles as torch pickles a storage: by a persistent id."""

    def __init__(self, key, kind, count):
        self.key, self.kind, self.count = key, kind, count


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as ``function(*args)``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args


class TorchPickler(pickle._Pickler):
    """Writes what torch.save writes, without torch."""

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", Global("torch", obj.kind), obj.key, "cpu", obj.count)
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def tensor(key, kind, count, size, stride, offset=0):
    storage = Storage(key, kind, count)
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, size, stride, False, OrderedDict())


def as_saved(arrays, prefix=""):
    """float32 arrays by name as torch saves a state_dict: the dictionary to pickle, and the storages."""
    named, storages = OrderedDict(), {}
    for number, (name, array) in enumerate(arrays.items()):
        strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        named[prefix + name] = tensor(str(number), "FloatStorage", array.size, array.shape, strides)
        storages[str(number)] = array
    return named, storages


def write_torch(path, content, storages, prefix="archive"):
    buffer = io.BytesIO()
    TorchPickler(buffer, 2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{prefix}/data.pkl", buffer.getvalue())
        for key, values in storages.items():
            archive.writestr(f"{prefix}/data/{key}", values.tobytes())
    return path


def write_pickle(path, content: bytes, storages=None):
    """A torch file with these bytes as its pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, values in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", values)
    return path


class LegacyStorage(Storage):
    """A storage of the old format, of which a tensor may see a part: (name, offset, count)."""

    def __init__(self, key, kind, count, view=None):
        super().__init__(key, kind, count)
        self.view = view


class LegacyPickler(TorchPickler):
    """Writes what torch.save wrote before version 1.6: the id of a storage has a sixth part."""

    def persistent_id(self, obj):
        key = super().persistent_id(obj)
        return key and (*key, getattr(obj, "view", None))


def write_legacy(path, content, storages, machine=None):
    """A file in torch's format of before 1.6: five pickles, then each storage's count and numbers."""
    little = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with path.open("wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, machine or little):
            pickle.dump(header, file, 2)
        LegacyPickler(file, 2).dump(content)
        pickle.dump(sorted(storages), file, 2)
        for key in sorted(storages):
            file.write(struct.pack("<q", storages[key].size) + storages[key].tobytes())
    return path
