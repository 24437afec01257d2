"""wip"""
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
