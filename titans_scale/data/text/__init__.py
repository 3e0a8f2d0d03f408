"""Text as it lies in files, and the documents in it."""
