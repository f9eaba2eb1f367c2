"""Figures and a self-contained HTML page from what an evaluation found."""
