"""The honest answer: which fold runs are missing, what the finished ones scored, and what the difference is worth."""
