"""The GPU backend. Its kernels are not part of this version: it answers what is missing, and "auto" goes past it."""

DEVICE_TYPES = ("cuda",)


def unavailable() -> str | None:
    return "the Triton kernels are not part of this version"
