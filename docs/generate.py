"""Writes the documents that are made from the code: docs/methods.md. Run as `make docs`."""

from pathlib import Path

from nnssl_ext.reports.methods import write_methods

if __name__ == "__main__":
    write_methods(Path(__file__).parent)
