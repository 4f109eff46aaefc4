"""Builds csrc/ into one plain shared library: no torch, no Python in it, so one wheel serves every version of both."""

import os
import warnings
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

# No flag names an instruction set (chosen at run time) or lets the compiler change a value: without errno and traps to keep
# it can vectorize square roots and selects.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # loaded with ctypes: the same name for every Python

    def build_extension(self, extension: Extension) -> None:
        for compile_openmp, link_openmp in ((["-fopenmp"], ["-fopenmp"]), (["-fopenmp-simd"], [])):  # or one thread
            extension.extra_compile_args, extension.extra_link_args = FLAGS + compile_openmp, link_openmp
            try:
                return super().build_extension(extension)
            except (CompileError, LinkError, PlatformError) as error:
                failure = error
        if not extension.optional:
            raise failure
        warnings.warn("spg_kernels: csrc/ did not compile, plain PyTorch will serve on the CPU instead of its kernels: "
                      f"{failure}")


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("spg_kernels.backends.libspg_kernels", sorted(glob("csrc/*.cpp")), depends=glob("csrc/*.h"),
                           language="c++", optional=os.environ.get("SPG_REQUIRE_NATIVE") != "1")],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
