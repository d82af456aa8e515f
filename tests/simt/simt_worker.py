"""Runs launches in a process of its own: one that a sanitizer may end. Needs no torch.

    LD_PRELOAD=libasan.so python simt_worker.py LIBRARY JOBS RESULTS

JOBS is pickled: buffers as bytes, and a list of (function, schedule, struct as bytes, places): a
place says that at an offset of the struct there is the address of a byte of a buffer. RESULTS gets
the (code, message) of each launch, and the buffers after the last.
"""

import ctypes
import pickle
import sys


def load(path):
    """The library, with the types of what is called."""
    library = ctypes.CDLL(path)
    library.simt_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p]
    library.simt_configure.restype = None
    library.simt_error.restype = ctypes.c_char_p
    return library


def launch(library, function, schedule, struct):
    """The launch's code and message."""
    library.simt_configure(*schedule)
    code = getattr(library, f"simt_{function}")(struct)
    return code, library.simt_error().decode()


def main(library, jobs, results):
    """Run all jobs; the buffers are of exact size, so that the sanitizer sees their ends."""
    library = load(library)
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    with open(jobs, "rb") as file:
        buffers, launches = pickle.load(file)
    memory = [libc.malloc(max(len(buffer), 1)) for buffer in buffers]
    for address, buffer in zip(memory, buffers, strict=True):
        ctypes.memmove(address, buffer, len(buffer))
    done = []
    for function, schedule, struct, places in launches:
        struct = ctypes.create_string_buffer(struct, len(struct))
        for offset, buffer, start in places:
            ctypes.c_uint64.from_buffer(struct, offset).value = memory[buffer] + start
        done.append(launch(library, function, schedule, struct))
    sizes = zip(memory, buffers, strict=True)
    with open(results, "wb") as file:
        pickle.dump((done, [ctypes.string_at(at, len(buffer)) for at, buffer in sizes]), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
