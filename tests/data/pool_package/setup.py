"""A module that is not cylora's and works in cylora's teams: all it needs is cylora installed and Cython."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(name="teams", version="1", ext_modules=cythonize([Extension("teams", ["teams.pyx"])], language_level=3))
