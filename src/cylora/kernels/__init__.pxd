# Marks the package for cimport: `from cylora.kernels.dispatch cimport adam_step`.
