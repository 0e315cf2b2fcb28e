"""CUDA kernels compiled on the machine that runs them: torch's own NVRTC, and the driver, by ctypes.

What was compiled is kept in the cache folder: the compiler takes seconds, and main memory that never comes back. A
launch costs some ten microseconds of the processor's time, which a captured graph pays once. Knows no kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from splitrun.folders import cache_folder

SHARED_BYTES_ATTRIBUTE = 8
"""The driver's number for the most shared memory that a function may be launched with."""
USUAL_SHARED_BYTES = 48 << 10
"""What every card has and every function may use."""


class CudaUnavailable(RuntimeError):
    """NVRTC or the driver is not there, or refuses. What is compiled is tried at once: another way is left then."""


class CudaKernels:
    """The functions of one compiled source, for one device.

    ``shared_bytes``: the most shared memory that a block of theirs may have.
    """

    def __init__(self, source: str, defines: dict[str, str | int], device: torch.device) -> None:
        """Compile and load. Raises CudaUnavailable."""
        text = "".join(f"#define {name} {value}\n" for name, value in defines.items()) + source
        major, minor = torch.cuda.get_device_capability(device)
        self._binary = machine_code(text, f"sm_{major}{minor}", cache_folder() / "kernels")
        self._driver = _driver()
        self._module = ctypes.c_void_p()
        torch.zeros(1, device=device)  # makes the device's context the thread's own
        with torch.cuda.device(device):
            _check(self._driver.cuModuleLoadData(ctypes.byref(self._module), self._binary), "loading a kernel")
        properties = torch.cuda.get_device_properties(device)
        self.shared_bytes: int = getattr(properties, "shared_memory_per_block_optin", USUAL_SHARED_BYTES)
        self._functions: dict[str, ctypes.c_void_p] = {}

    def launch(
        self, name: str, blocks: int, threads: int, shared_bytes: int, arguments: Sequence[Tensor | int | None]
    ) -> None:
        """Launch a function on the current stream; tensors are passed as pointers, None as a null pointer."""
        values = [
            ctypes.c_int(argument)
            if isinstance(argument, int)
            else ctypes.c_void_p(None if argument is None else argument.data_ptr())
            for argument in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = self._function(name)
        status = self._driver.cuLaunchKernel(
            function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, pointers, None
        )
        _check(status, f"launching {name}")

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            found = self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
            _check(found, f"finding {name}")
            found = self._driver.cuFuncSetAttribute(function, SHARED_BYTES_ATTRIBUTE, self.shared_bytes)
            _check(found, f"giving {name} shared memory")
            self._functions[name] = function
        return self._functions[name]


def machine_code(text: str, architecture: str, folder: Path) -> bytes:
    """What a source compiles to: from ``folder`` where it was compiled before, else kept there if that can be.

    Raises CudaUnavailable.
    """
    conditions = f"{torch.version.cuda} {architecture}\n{text}"
    file = folder / f"{hashlib.sha256(conditions.encode()).hexdigest()[:32]}.cubin"
    with suppress(OSError):
        checksum, _, binary = file.read_bytes().partition(b"\n")
        if hashlib.sha256(binary).hexdigest().encode() == checksum:
            return binary
    binary = _compiled(text, architecture)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(hashlib.sha256(binary).hexdigest().encode() + b"\n" + binary)
        part.replace(file)
    return binary


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaUnavailable(str(error)) from error


@cache
def _compiler() -> ctypes.CDLL:
    """NVRTC as torch brings it."""
    major = (torch.version.cuda or "0").split(".")[0]
    name = f"libnvrtc.so.{major}"
    folder = Path(torch.__file__).parent
    places = [name, *map(str, folder.parent.glob(f"nvidia/*/lib/{name}")), *map(str, folder.glob(f"lib/{name}*"))]
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise CudaUnavailable(f"{name} is not there")


def _compiled(text: str, architecture: str) -> bytes:
    """The machine code of a source. Raises CudaUnavailable with the compiler's first complaint."""
    compiler, program = _compiler(), ctypes.c_void_p()
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
    _check(compiler.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"splitrun.cu", 0, None, None), "NVRTC")
    try:
        if compiler.nvrtcCompileProgram(program, len(options), options):
            size = ctypes.c_size_t()
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, log)
            raise CudaUnavailable(log.value.decode(errors="replace").strip()[:500])
        size = ctypes.c_size_t()
        _check(compiler.nvrtcGetCUBINSize(program, ctypes.byref(size)), "NVRTC")
        binary = ctypes.create_string_buffer(size.value)
        _check(compiler.nvrtcGetCUBIN(program, binary), "NVRTC")
        return binary.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _check(status: int, what: str) -> None:
    if status:
        raise CudaUnavailable(f"{what}: status {status}")
