"""Packed weights kept on the disk for the next start: the file, and the folder of such files."""
