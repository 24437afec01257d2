"""Which sequences run in the next step, and which cache blocks they hold. Pure: no torch, no clock."""
