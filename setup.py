from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class SourceDistribution(sdist):
    """With what CMake reads, of which setuptools knows nothing."""

    def make_distribution(self) -> None:
        native = (str(path) for path in sorted(Path("csrc").rglob("*")) if path.is_file())
        self.filelist.extend(["CMakeLists.txt", "constraints.txt", *native])
        super().make_distribution()


# Everything else is in pyproject.toml; this makes setuptools run CMake through scikit-build-core.
setup(cmake_source_dir=".", cmdclass={"sdist": SourceDistribution})
