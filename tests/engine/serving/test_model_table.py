"""Which models are loaded and unloaded: the rules as a random walk, and one by one. No engine, no thread, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine import (
    EngineDead,
    LoadError,
    LoadInterrupted,
    ModelConfig,
    ModelInUse,
    ModelLoading,
    ModelNotFound,
    NoRoom,
    NotEnoughMemory,
)
from engine.serving.models.slot import OCCUPYING, Slot
from engine.serving.models.table import LONG_LIFE, PAUSES, SIDE_BY_SIDE, Load, ModelTable, Unload

GIB = 2**30
IDS = "abcde"
SIZES = dict(zip(IDS, (1, 2, 3, 5, 8), strict=True))
MEMORY = 9


def entry(name: str, isolation: Any = "thread", **fields: Any) -> ModelConfig:
    return ModelConfig(id=name, path=Path("/models", name), isolation=isolation, **fields)


class World:
    """A machine of some GiB on which models are loaded when a test says so."""

    def __init__(self, *configs: ModelConfig, memory: int = MEMORY, max_loaded: int | None = None) -> None:
        self.table = ModelTable(configs, max_loaded)
        self.memory = memory
        self.now = 0.0
        self.loading: list[Slot] = []
        self.unloading: list[Slot] = []
        self.done: list[str] = []
        self.loads: list[tuple[Slot, int]] = []

    @property
    def free(self) -> int:
        taken = sum(SIZES[slot.id] for slot in self.table.slots if slot.state in ("ready", "unloading"))
        return (self.memory - taken) * GIB

    def plan(self) -> None:
        """Let the table decide until it has nothing more to do, and begin what it wants."""
        for slot in self.table.slots:
            slot.needed = SIZES[slot.id] * GIB
        self.table.plan(self.free, self.now)
        for action in self.table.actions:
            if isinstance(action, Load):
                self.loading.append(action.slot)
                self.loads.append((action.slot, self.free))
                self.done.append(f"+{action.slot.id}")
            elif isinstance(action, Unload):
                assert action.slot.users == 0, "a model was unloaded under its requests"
                self.unloading.append(action.slot)
                self.done.append(f"-{action.slot.id}")
        self.table.actions.clear()
        self.table.check()

    def open(self, slot: Slot) -> None:
        self.loading.remove(slot)
        self.table.opened(slot, SIZES[slot.id] * GIB, self.now)

    def close(self, slot: Slot) -> None:
        self.unloading.remove(slot)
        self.table.unloaded(slot)

    def settle(self) -> None:
        """Carry out everything that is under way, and what follows from it."""
        self.plan()
        while self.loading or self.unloading:
            for slot in list(self.unloading):
                self.close(slot)
            for slot in list(self.loading):
                self.open(slot)
            self.plan()

    def states(self) -> dict[str, str]:
        return {slot.id: slot.state for slot in self.table.shown()}

    def use(self, name: str) -> Slot:
        """A request that has come and gone, a second later."""
        slot = self.table.claim(name, self.now)
        self.settle()
        self.now += 1
        self.table.release(slot, self.now)
        return slot


def on_demand(*names: str, **fields: Any) -> list[ModelConfig]:
    return [entry(name, load="on_demand", **fields) for name in names]


class Walk(RuleBasedStateMachine):
    """Anything that may happen to five models on a machine that does not hold them all, in any order."""

    @initialize(
        starts=st.lists(st.booleans(), min_size=5, max_size=5),
        idle=st.lists(st.sampled_from([None, 3.0, 30.0]), min_size=5, max_size=5),
        max_loaded=st.sampled_from([None, 1, 2, 3]),
    )
    def begin(self, starts: list[bool], idle: list[float | None], max_loaded: int | None) -> None:
        self.entries = {
            name: entry(name, load="at_start" if start else "on_demand", idle_seconds=seconds)
            for name, start, seconds in zip(IDS, starts, idle, strict=True)
        }
        self.world = World(*self.entries.values(), max_loaded=max_loaded)
        self.claims: list[Slot] = []

    @rule(name=st.sampled_from(IDS), insist=st.booleans())
    def claim(self, name: str, insist: bool) -> None:
        try:
            self.claims.append(self.world.table.claim(name, self.world.now, insist=insist))
        except (ModelNotFound, ModelLoading, EngineDead):
            return

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.claims))
        self.claims.remove(slot)
        self.world.table.release(slot, self.world.now)

    @rule(name=st.sampled_from(IDS))
    def ask(self, name: str) -> None:
        if name in self.entries:
            self.world.table.ask(name)

    @rule(name=st.sampled_from(IDS))
    def dismiss(self, name: str) -> None:
        try:
            self.world.table.dismiss(name)
        except (ModelNotFound, ModelInUse):
            return

    @rule(passed=st.sampled_from([0.0, 1.0, 2.0, 40.0, 700.0]))
    def plan(self, passed: float) -> None:
        self.world.now += passed
        self.world.plan()

    @precondition(lambda self: self.world.loading)
    @rule(data=st.data(), end=st.sampled_from(["open", "open", "broken", "short"]))
    def end_load(self, data: st.DataObject, end: str) -> None:
        slot = data.draw(st.sampled_from(self.world.loading))
        if end == "open":
            self.world.open(slot)
            return
        self.world.loading.remove(slot)
        error = NotEnoughMemory("too little", needed=1, free=0) if end == "short" else LoadError("broken")
        self.world.table.failed(slot, error)

    @precondition(lambda self: self.world.unloading)
    @rule(data=st.data())
    def end_unload(self, data: st.DataObject) -> None:
        self.world.close(data.draw(st.sampled_from(self.world.unloading)))

    @rule(name=st.sampled_from(IDS))
    def die(self, name: str) -> None:
        for slot in list(self.world.table.slots):
            if slot.id == name and slot.state == "ready":
                self.world.table.died(slot, EngineDead("a fault"), self.world.now)

    @rule(name=st.sampled_from(IDS), change=st.sampled_from(["remove", "replace", "load", "idle"]))
    def reload(self, name: str, change: str) -> None:
        before = self.entries.get(name)
        if before is None or change == "replace":
            rows = before.max_sequences % 7 + 1 if before else 1
            self.entries[name] = entry(name, load=before.load if before else "at_start", max_sequences=rows)
        elif change == "remove" and len(self.entries) > 1:
            del self.entries[name]
        elif change == "load":
            other = "at_start" if before.load == "on_demand" else "on_demand"
            self.entries[name] = before.model_copy(update={"load": other})
        else:
            self.entries[name] = before.model_copy(update={"idle_seconds": 5.0})
        self.world.table.apply(list(self.entries.values()))

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "world"):
            return
        table = self.world.table
        for action in table.actions:
            assert not isinstance(action, Unload) or action.slot.users == 0
            assert not isinstance(action, Load), "only a plan begins a load"
        self._carry_out_unloads()
        table.check()
        assert [slot.id for slot in table.shown()] == list(self.entries)
        loading = [slot for slot in table.slots if slot.state == "loading"]
        assert len(loading) <= 1, "these are all loaded in one process, one after the other"
        occupied = sum(slot.state in OCCUPYING for slot in table.slots)
        if table.max_loaded is not None:
            assert occupied <= table.max_loaded
        for slot in self.claims:
            assert slot.users >= 1

    def _carry_out_unloads(self) -> None:
        """An unload that was begun by something else than a plan."""
        self.world.unloading += [action.slot for action in self.world.table.actions if isinstance(action, Unload)]
        self.world.table.actions.clear()

    def teardown(self) -> None:
        """Once nothing more happens, everybody who waits has an answer: nobody is forgotten."""
        if not hasattr(self, "world"):
            return
        for _ in range(20):
            self.world.now += PAUSES[-1] + 1
            self.world.settle()
            answered = [slot for slot in self.claims if slot.answers_waiters]
            for slot in answered:
                self.claims.remove(slot)
                self.world.table.release(slot, self.world.now)
        assert not self.claims, [(slot.id, slot.state) for slot in self.claims]
        assert not any(slot.retired for slot in self.world.table.slots)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_at_start_in_the_order_of_the_file_and_the_rest_on_demand() -> None:
    world = World(entry("c"), *on_demand("a"), entry("b"))
    world.settle()
    assert world.done == ["+c", "+b"]
    assert world.states() == {"c": "ready", "a": "unloaded", "b": "ready"}


def test_several_processes_load_side_by_side_as_far_as_memory_allows() -> None:
    world = World(*(entry(name, "process") for name in "abcd"), memory=7)
    world.plan()
    assert world.done == ["+a", "+b", "+c"], "d would need what is not there once these are loaded"
    assert len(world.loading) == SIDE_BY_SIDE
    world.settle()
    assert world.states()["d"] == "failed"
    assert "needs 5.0 GiB of memory, 1.0 GiB are free" in world.table.find("d").detail


def test_what_needs_an_unknown_part_of_a_gpu_is_loaded_alone() -> None:
    """Both would divide up the same free memory, and neither would know of the other's steps."""
    table = ModelTable([entry(name, "process") for name in "abcd"])
    slots = dict(zip("abcd", table.slots, strict=True))
    slots["a"].needed = slots["d"].needed = GIB
    order = []
    while table.slots and not all(slot.state == "ready" for slot in table.slots):
        table.plan(9 * GIB, 0.0)
        order.append([action.slot.id for action in table.actions])
        table.actions.clear()
        table.opened(next(slot for slot in table.slots if slot.state == "loading"), GIB, 0.0)
    assert order == [["a"], ["b"], ["c"], ["d"]]


def test_requests_are_refused_while_the_server_starts_and_wait_on_demand() -> None:
    world = World(entry("a"), *on_demand("b"))
    with pytest.raises(ModelLoading):
        world.table.claim("a", 0)
    slot = world.table.claim("b", 0)
    assert slot.state == "waiting"
    world.settle()
    assert slot.state == "ready"


def test_the_least_recently_used_leaves_first() -> None:
    world = World(*on_demand("a", "b", "c", "d"), memory=6)
    for name in "abca":
        world.use(name)
    assert world.done == ["+a", "+b", "+c"]
    world.use("d")
    assert world.done[3:] == ["-b", "-c", "+d"], "a was used after them, and there is room for it"


def test_a_model_that_serves_never_leaves() -> None:
    world = World(*on_demand("a", "b", "d"), memory=6)
    a = world.table.claim("a", 0)
    world.settle()
    world.use("b")
    world.use("d")
    assert a.state == "ready"
    assert world.states() == {"a": "ready", "b": "unloaded", "d": "ready"}
    d = world.table.claim("d", world.now)
    refused = world.table.claim("b", world.now)
    world.settle()
    assert (a.state, d.state, refused.state) == ("ready", "ready", "unloaded")
    error = refused.error
    assert isinstance(error, NoRoom)
    assert (error.details["needed"], error.details["free"]) == (2 * GIB, 0)
    assert [holder["id"] for holder in error.details["holders"]] == ["a", "d"]
    assert "b needs 2.0 GiB of memory, 0 B are free; loaded: a (1.0 GiB, 1 requests), d" in error.message


def test_nothing_leaves_in_vain() -> None:
    """An idle model stays if even its memory would not be enough."""
    world = World(*on_demand("a", "b", "e"), memory=9)
    a = world.table.claim("a", 0)
    world.settle()
    b = world.use("b")
    world.memory = 8
    e = world.table.claim("e", world.now)
    world.settle()
    assert (a.state, b.state, e.state) == ("ready", "ready", "unloaded")


def test_no_more_are_loaded_than_may_be() -> None:
    world = World(*on_demand("a", "b", "c"), max_loaded=2)
    for name in "abc":
        world.use(name)
    assert world.done == ["+a", "+b", "-a", "+c"]
    b, c = (world.table.claim(name, world.now) for name in "bc")
    a = world.table.claim("a", world.now)
    world.settle()
    assert (b.state, c.state, a.state) == ("ready", "ready", "unloaded")
    assert "max_loaded allows 2 models at once" in str(a.error)
    world.table.release(b, world.now)
    world.table.release(a, world.now)
    assert world.use("a").state == "ready", "and once one is idle, it may"


def test_memory_that_runs_out_while_loading_makes_others_leave() -> None:
    """What the estimate did not know: a card's memory, or another program that took it meanwhile."""
    world = World(*on_demand("a", "b"))
    world.use("a")
    b = world.table.claim("b", world.now)
    world.plan()
    [slot] = world.loading
    world.loading.clear()
    world.table.failed(slot, NotEnoughMemory("b: 7 GiB are needed", needed=7 * GIB, free=GIB))
    world.settle()
    assert world.done == ["+a", "+b", "-a", "+b"]
    assert b.state == "ready"


def test_and_with_nobody_to_leave_the_request_is_refused_by_what_was_found() -> None:
    world = World(*on_demand("b"))
    b = world.table.claim("b", 0)
    world.plan()
    world.loading.clear()
    world.table.failed(b, NotEnoughMemory("b: 7 GiB are needed", needed=7 * GIB, free=GIB))
    world.settle()
    assert b.answers_waiters
    assert isinstance(b.error, NoRoom)
    assert "needs 7.0 GiB of memory, 1.0 GiB are free" in b.error.message


@pytest.mark.parametrize(("error", "again"), [(LoadError("b: no"), False), (LoadInterrupted("b: killed"), True)])
def test_what_was_ended_while_it_loaded_is_tried_again_by_the_next_request(error: LoadError, again: bool) -> None:
    world = World(*on_demand("b"))
    b = world.table.claim("b", 0)
    world.plan()
    world.loading.clear()
    world.table.failed(b, error)
    world.settle()
    assert b.answers_waiters
    assert b.error is error
    world.table.release(b, 1)
    if not again:
        with pytest.raises(EngineDead, match="b could not be loaded: no"):
            world.table.claim("b", 2)
        return
    world.table.claim("b", 2)
    world.settle()
    assert b.state == "ready"


@pytest.mark.parametrize("idle", [0.5, 60.0])
def test_an_idle_model_leaves_and_comes_back(idle: float) -> None:
    world = World(entry("a", idle_seconds=idle))
    world.settle()
    assert world.table.next_due() == idle
    slot = world.table.claim("a", 0)
    world.now = 10 * idle
    world.settle()
    assert slot.state == "ready", "a reply may take longer than that"
    world.table.release(slot, world.now)
    world.now += idle
    world.settle()
    assert slot.state == "unloaded"
    assert not slot.required, "a server is ready whose idle models have left"
    world.use("a")
    assert slot.state == "ready"


def test_a_model_that_dies_is_loaded_again_a_few_times() -> None:
    world = World(entry("a"))
    world.settle()
    [slot] = world.table.slots
    for pause in PAUSES:
        world.table.died(slot, EngineDead("signal 9"), world.now)
        assert (slot.state, slot.required) == ("dead", True)
        waiting = world.table.claim("a", world.now)
        world.now += pause - 0.1
        world.settle()
        assert slot.state == "dead"
        world.now += 0.2
        world.settle()
        assert waiting.state == "ready"
        world.table.release(waiting, world.now)
    world.now += LONG_LIFE / 2
    world.table.died(slot, EngineDead("signal 9"), world.now)
    assert slot.state == "failed"
    with pytest.raises(EngineDead, match=r"has died 4 times: signal 9"):
        world.table.claim("a", world.now)
    world.table.ask("a")
    world.settle()
    assert slot.state == "ready", "somebody insisted"
    for _ in range(2 * len(PAUSES)):
        world.now += LONG_LIFE + 1
        world.table.died(slot, EngineDead("signal 9"), world.now)
        assert slot.state == "dead", "after a long life it is the first time again"
        world.now += PAUSES[0]
        world.settle()


def test_a_model_is_not_unloaded_under_its_requests() -> None:
    world = World(*on_demand("a"))
    slot = world.table.claim("a", 0)
    with pytest.raises(ModelInUse):
        world.table.dismiss("a")
    world.settle()
    with pytest.raises(ModelInUse):
        world.table.dismiss("a")
    world.table.release(slot, 0)
    world.table.dismiss("a")
    assert slot.state == "unloading"
    again = world.table.claim("a", 0)
    world.unloading.append(slot)
    world.table.actions.clear()
    world.settle()
    assert again.state == "ready", "a request that comes meanwhile has it loaded again"


# -- a changed configuration ---------------------------------------------------------------------------------------


def _reload(world: World, *configs: ModelConfig) -> str:
    changed = str(world.table.apply(configs))
    world.unloading += [action.slot for action in world.table.actions if isinstance(action, Unload)]
    world.table.actions.clear()
    return changed


def test_only_what_changed_changes() -> None:
    first: Sequence[ModelConfig] = [entry("a"), entry("b"), *on_demand("c")]
    world = World(*first)
    world.settle()
    a, b, _ = world.table.slots
    assert _reload(world, *first) == "no model has changed"
    told = _reload(world, entry("b", idle_seconds=9), entry("a"), entry("d"))
    assert told == "new: d; removed: c; changed in place: b"
    world.settle()
    assert world.done == ["+a", "+b", "+d"]
    assert (a.state, b.state, b.config.idle_seconds) == ("ready", "ready", 9)
    assert list(world.states()) == ["b", "a", "d"]
    with pytest.raises(ModelNotFound):
        world.table.claim("c", 0)


def test_a_removed_model_ends_what_it_has_begun() -> None:
    world = World(entry("a"), entry("b"))
    world.settle()
    slot = world.table.claim("a", 0)
    _reload(world, entry("b"))
    world.settle()
    assert slot.state == "ready"
    with pytest.raises(ModelNotFound):
        world.table.claim("a", 0)
    world.table.release(slot, 0)
    world.settle()
    assert world.table.slots == [world.table.find("b")]


def test_a_replaced_model_serves_until_the_new_one_does() -> None:
    world = World(entry("a"))
    world.settle()
    old = world.table.claim("a", 0)
    assert _reload(world, entry("a", max_sequences=3)) == "replaced: a"
    world.plan()
    assert world.table.claim("a", 0) is old
    world.settle()
    new = world.table.claim("a", 0)
    assert (new is old, new.config.max_sequences, old.state, old.retired) == (False, 3, "ready", True)
    for _ in range(2):
        world.table.release(old, 0)
    world.settle()
    assert world.table.slots == [new]


def test_without_room_for_both_requests_wait_for_the_new_one() -> None:
    world = World(entry("d"), memory=6)
    world.settle()
    old = world.table.claim("d", 0)
    _reload(world, entry("d", max_sequences=3))
    world.settle()
    waiting = world.table.claim("d", 0)
    assert (old.state, waiting.state) == ("ready", "waiting")
    world.table.release(old, 0)
    world.settle()
    assert (waiting.state, waiting.config.max_sequences) == ("ready", 3)
    assert world.table.slots == [waiting]


def test_a_new_entry_that_cannot_be_loaded_leaves_the_old_one_serving() -> None:
    world = World(entry("a"))
    world.settle()
    [old] = world.table.slots
    _reload(world, entry("a", max_sequences=3))
    world.plan()
    [new] = world.loading
    world.loading.clear()
    world.table.failed(new, LoadError("a: is damaged"))
    assert world.table.claim("a", 0) is old
    assert _reload(world, entry("a", max_sequences=3)) == "tried again: a"
    world.settle()
    assert world.table.find("a") is new


def test_load_changes_in_place() -> None:
    world = World(entry("a"), *on_demand("b"))
    world.settle()
    _reload(world, *on_demand("a"), entry("b"))
    world.settle()
    assert world.done == ["+a", "+b"]
    assert {slot.id: slot.required for slot in world.table.slots} == {"a": False, "b": True}
