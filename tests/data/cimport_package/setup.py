"""A package that is not cylora's and calls its loops from C: all it needs is cylora installed and Cython."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    name="foreign",
    version="1",
    packages=["foreign"],
    ext_modules=cythonize([Extension("foreign.steps", ["foreign/steps.pyx"])], language_level=3),
)
