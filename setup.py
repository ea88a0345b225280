from setuptools import setup

# Everything else is in pyproject.toml; this one line makes setuptools run CMake through scikit-build-core.
setup(cmake_source_dir=".")
