"""Parts of the command line, which :mod:`lightning_sparse_cl.__main__` puts together."""

__all__: list[str] = []
