"""A module that is not cylora's and works in cylora's teams: all it needs is cylora installed and Cython."""

import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

names = ["teams", "held_atfork"] if sys.platform == "linux" else ["teams"]
setup(
    name="teams",
    version="1",
    ext_modules=cythonize([Extension(name, [f"{name}.pyx"]) for name in names], language_level=3),
)
