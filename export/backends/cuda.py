"""NVIDIA's driver: whether it is there, its GPU, and the few calls that running an engine takes.

Through ctypes, so that neither torch nor cuda-python is needed.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import asdict, dataclass
from typing import Any

from numpy.typing import NDArray

from lowprec.errors import MissingDependencyError, UnsupportedError

_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NAME_LENGTH = 100


@dataclass(frozen=True)
class Gpu:
    """A device.

    Args:
        name: as the driver calls it.
        capability: compute capability, `8.6`.
        driver: CUDA version that the driver supports, `13.0`.
    """

    name: str
    capability: str
    driver: str

    def to_dict(self) -> dict[str, str]:
        """Plain data for a sidecar."""
        return asdict(self)


class Driver:
    """The driver with device 0's primary context current, and one stream.

    Args:
        library: of the driver.

    Raises:
        MissingDependencyError: no driver, or no device.
    """

    def __init__(self, library: str = _LIBRARY) -> None:
        try:
            self._lib = ctypes.CDLL(library)
        except OSError:
            raise MissingDependencyError(f"no NVIDIA driver ({library}) on this machine") from None
        self._call("cuInit", 0, missing=True)
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0, missing=True)
        self._context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.make_current()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)
        self.stream = int(stream.value or 0)

    def make_current(self) -> None:
        """Makes the device's context that of the calling thread, which what follows takes."""
        self._call("cuCtxSetCurrent", self._context)

    def gpu(self) -> Gpu:
        """Device 0."""
        name = ctypes.create_string_buffer(_NAME_LENGTH)
        self._call("cuDeviceGetName", name, _NAME_LENGTH, self._device)
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        capability = f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}"
        return Gpu(name.value.decode(), capability, f"{version.value // 1000}.{version.value % 1000 // 10}")

    def allocate(self, count: int) -> int:
        """Address of so many bytes on the device, one at least."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(count, 1)))
        return int(address.value)

    def free(self, address: int) -> None:
        """Gives memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def to_device(self, address: int, array: NDArray[Any]) -> None:
        """Copies a contiguous array to the device, in the stream's order."""
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), *_host(array), ctypes.c_void_p(self.stream))

    def to_host(self, array: NDArray[Any], address: int) -> None:
        """Copies from the device into a contiguous array, in the stream's order."""
        host, count = _host(array)
        self._call("cuMemcpyDtoHAsync_v2", host, ctypes.c_uint64(address), count, ctypes.c_void_p(self.stream))

    def synchronize(self) -> None:
        """Waits for the stream; errors of what ran in it are raised here."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        return value.value

    def _call(self, name: str, *arguments: Any, missing: bool = False) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(status, ctypes.byref(text))
            said = text.value.decode() if text.value else "no reason given"
            kind = MissingDependencyError if missing else UnsupportedError
            raise kind(f"the NVIDIA driver refuses {name}: {said} ({status})")


def _host(array: NDArray[Any]) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)


def missing_driver() -> str | None:
    """That there is no NVIDIA driver here, or None."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return f"no NVIDIA driver ({_LIBRARY}) on this machine"
    return None


@functools.cache
def driver() -> Driver:
    """The process's driver."""
    return Driver()


def gpu_or_none() -> Gpu | None:
    """Device 0 of this machine, or None where there is no driver or device."""
    try:
        return driver().gpu()
    except MissingDependencyError:
        return None
