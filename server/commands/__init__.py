"""The commands that are no other package's: one file each. Their modules import at once only what `--help` needs."""
