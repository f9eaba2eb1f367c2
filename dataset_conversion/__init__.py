"""Converters of public datasets and common layouts into raw datasets, found by `nnssl_convert` by their names.

A module `DatasetXXX_Name.py` with a function `convert(source: Path, raw: Path) -> list[Path]` becomes the command
`nnssl_convert DatasetXXX_Name SOURCE`: it writes below `raw` and returns the folders that it wrote.
"""
