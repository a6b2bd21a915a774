"""Steps that are recorded once and replayed with other inputs: what becomes of it without a GPU.

Here a replay takes the same steps again with the buffers of the record, which is what a CUDA graph does; the buffers of
the batch are poisoned, since a graph would read where they were.
"""

import pytest
import torch

from nfscale.engine import Stop, recorded
from nfscale.engine.batch import Batch, Slot
from nfscale.engine.dispatch import Step, chosen
from nfscale.engine.handwritten import handwritten_apply, handwritten_gradient, handwritten_gradient_and_hvp
from nfscale.engine.recorded import Recorded
from nfscale.fields import MLP
from tests.engine.fits import DATA, FIELD, SIGNAL, assert_same_bits, fitted
from tests.engine.test_handwritten import OPTIMIZERS, batch_of, random_samples

CPU = torch.device("cpu")


class Again:
    """A graph of this device."""

    def __init__(self, device: torch.device) -> None:
        self.replays = 0
        MADE.append(self)

    def run(self, body):
        body()

    def record(self, body):
        self._body = body

    def replay(self):
        self.replays += 1
        self._body()


MADE: list[Again] = []


@pytest.fixture(autouse=True)
def forgotten():
    MADE.clear()
    recorded._say_once.cache_clear()


def step_with(advance: Recorded) -> Step:
    return Step("torch", handwritten_gradient, handwritten_apply, advance, handwritten_gradient_and_hvp)


def move(batch: Batch) -> None:
    """Everything of the batch to another place, and what cannot be true where it was."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
        return copy

    batch.rows, batch.samples = moved(batch.rows), batch.samples.map(moved)
    batch.presented = batch.samples
    batch.seeds, batch.steps, batch.rate = moved(batch.seeds), moved(batch.steps), moved(batch.rate)
    batch.state = {
        name: moved(value) if isinstance(value, torch.Tensor) else {"rows": moved(value["rows"])}
        for name, value in batch.state.items()
    }


def assert_equal(ours: Batch, theirs: Batch) -> None:
    occupied = ours.occupied
    assert torch.equal(ours.rows, theirs.rows)
    for name, value in ours.state.items():
        expected = theirs.state[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(value[occupied], expected[occupied])
        else:
            assert torch.equal(value["rows"][occupied], expected["rows"][occupied]), name


def advance_alike(ours: Batch, plain: Batch, times: int) -> None:
    for _ in range(times):
        for batch in (ours, plain):
            batch.advance(10)
        assert_equal(ours, plain)


@pytest.mark.parametrize("per_step", [63, 16])
@pytest.mark.parametrize("width", [12, 13])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_replay_is_the_steps_themselves_while_data_come_and_go(kind, width, per_step):
    field, optimizer = MLP(2, 1, width=width, depth=2, omega_0=10.0, omega_hidden=10.0), OPTIMIZERS[kind]
    ours = batch_of(step_with(Recorded(graph=Again)), optimizer, field, 63, per_step)
    plain = batch_of(chosen("torch", CPU, field, SIGNAL, optimizer), optimizer, field, 63, per_step)
    start = ours.rows.clone()
    for number in range(7):
        if number == 4:  # one leaves, another one comes, one begins anew at half the rate
            new = random_samples(2, 1, 63, per_step % 2 == 1, 6, torch.float32).map(lambda tensor: tensor[5])
            for batch in (ours, plain):
                batch.slots[1] = None
                batch.fill(4, Slot("new", 17), start[4], new)
                batch.reset(0, Slot("0", 0, restarts=1), start[0])
        if number == 5:
            for batch in (ours, plain):
                batch.slots[2] = None
        move(ours)
        for batch in (ours, plain):
            batch.advance(10)
        assert_equal(ours, plain)
    (graph,) = MADE
    assert graph.replays == 4
    for batch in (ours, plain):
        batch.keep([4, 0])
    advance_alike(ours, plain, 4)
    assert [graph.replays for graph in MADE] == [4, 1], "a batch of another shape has a record of its own"


def test_fits_are_the_same_bits(monkeypatch):
    stop = Stop(max_steps=80, check_every=10)
    expected = fitted(DATA, samples=16, step="torch", batch=3, stop=stop)
    monkeypatch.setattr("nfscale.engine.handwritten.handwritten_steps", Recorded(graph=Again))
    found = fitted(DATA, samples=16, step="torch", batch=3, stop=stop)
    assert sum(graph.replays for graph in MADE) > 0
    for datum_id, result in expected.items():
        assert_same_bits(found[datum_id], result)


@pytest.mark.parametrize(("count", "cadence", "length"), [(50, 10, 50), (100, 1, 100), (120, 10, 60), (337, 1, 85)])
def test_many_steps_are_replayed_in_parts(count, cadence, length):
    assert recorded._length(count, cadence) == length


@pytest.mark.parametrize(("kind", "replays"), [("adam", 2), ("esgd-shared", 1), ("esgd-per_field", 1)])
def test_parts_and_what_is_left_are_the_steps_themselves(kind, replays, monkeypatch):
    monkeypatch.setattr(recorded, "_MOST_STEPS", 20)
    ours = batch_of(step_with(Recorded(graph=Again)), OPTIMIZERS[kind], FIELD, 63, 16)
    plain = batch_of(chosen("torch", CPU, FIELD, SIGNAL, OPTIMIZERS[kind]), OPTIMIZERS[kind], FIELD, 63, 16)
    for batch in (ours, plain):
        batch.advance(90)  # five times 18; of ESGD, that looks at every tenth, four times 20 and 10
    assert_equal(ours, plain)
    assert MADE[0].replays == replays


@pytest.mark.parametrize("where", ["run", "record", "replay"])
def test_where_a_graph_fails_the_steps_are_taken_and_it_is_said_once(where):
    class Failing(Again):
        pass

    def fail(self, *body):
        raise RuntimeError("operation not permitted when stream is capturing")

    setattr(Failing, where, fail)
    adam = OPTIMIZERS["adam"]
    ours = batch_of(step_with(Recorded(graph=Failing)), adam, FIELD, 63, 16)
    plain = batch_of(chosen("torch", CPU, FIELD, SIGNAL, adam), adam, FIELD, 63, 16)
    with pytest.warns(UserWarning, match="launched one by one, .*not permitted when stream is capturing") as heard:
        advance_alike(ours, plain, 6)
    assert len(heard) == len(MADE) == 1


def test_no_graph_is_made_where_it_does_not_pay(monkeypatch):
    adam = OPTIMIZERS["adam"]
    few_steps = batch_of(step_with(Recorded(graph=Again)), adam, FIELD, 63, 16)
    for _ in range(5):
        few_steps.advance(4)
    few_runs = batch_of(step_with(Recorded(graph=Again)), adam, FIELD, 63, 16)
    for _ in range(2):
        few_runs.advance(10)
    monkeypatch.setattr(recorded, "_MOST_BYTES", 10_000)
    large = batch_of(step_with(Recorded(graph=Again)), adam, FIELD, 63, 16)
    for _ in range(5):
        large.advance(10)
    assert not MADE


def test_on_a_cpu_there_are_no_graphs():
    assert not isinstance(chosen("torch", CPU, FIELD, SIGNAL, OPTIMIZERS["adam"]).advance, Recorded)
    wide = MLP(2, 1, width=100)
    assert isinstance(chosen("torch", torch.device("cuda"), wide, SIGNAL, OPTIMIZERS["adam"]).advance, Recorded)
