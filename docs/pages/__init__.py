"""The pages of docs/reference, each written from the code. Run `docs/generate.py`."""
