"""Tables by sample: which value stays, on one rank and on two."""

import pytest
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from debias import tag
from debias.errors import DebiasError
from debias.ops.samples import SampleTable
from debias.step.samples import numbered_dataset


def oracle(size, steps):
    """The last step of each sample, of one step the first row."""
    values, stamps = [0.0] * size, [0] * size
    for stamp, numbers, rows, keep in steps:
        done = set()
        for number, value, kept in zip(numbers, rows, keep, strict=True):
            if 0 <= number < size and kept and number not in done:
                done.add(number)
                values[number], stamps[number] = value, stamp
    return values, stamps


def steps(seed=0, size=7, n=12, count=5):
    g = torch.Generator().manual_seed(seed)
    return [
        (
            stamp,
            torch.randint(-1, size + 1, (n,), generator=g).tolist(),
            torch.rand(n, generator=g, dtype=torch.float64).tolist(),
            (torch.rand(n, generator=g) < 0.8).tolist(),
        )
        for stamp in range(1, count + 1)
    ]


def table_of(steps, rows=slice(None), size=7):
    table = SampleTable(size)
    for stamp, numbers, values, keep in steps:
        value = torch.tensor(values[rows], dtype=torch.float64)
        pair = torch.stack([value, -value], 1).float()
        table.record(
            torch.tensor(numbers[rows]), stamp, keep=torch.tensor(keep[rows]), value=value, pair=pair, high=value > 0.5
        )
    return table


@pytest.mark.parametrize("seed", range(5))
def test_against_a_loop(seed):
    table = table_of(steps(seed))
    values, stamps = oracle(7, steps(seed))
    assert table["value"].tolist() == values
    assert table.stamps[:7].tolist() == stamps
    assert table.seen.tolist() == [s > 0 for s in stamps]
    assert table["pair"][:, 1].tolist() == (-table["value"].float()).tolist()
    assert table["high"].tolist() == [v > 0.5 for v in values]


def test_running_values_against_a_loop():
    table, running = SampleTable(5), {}
    for stamp, numbers, values, keep in steps(size=5):
        done = set()
        for i, (number, value) in enumerate(zip(numbers, values, strict=True)):
            if 0 <= number < 5 and keep[i] and number not in done:
                done.add(number)
                running[number] = 0.7 * running[number] + 0.3 * value if number in running else value
        number, kept = torch.tensor(numbers), torch.tensor(keep)
        table.average("loss", number, torch.tensor(values, dtype=torch.float64), 0.7, kept)
        table.record(number, stamp, keep=kept)
    assert table["loss"].tolist() == pytest.approx([running.get(i, 0.0) for i in range(5)], rel=1e-12)


def _merged(rank, seed):
    table = table_of(steps(seed), slice(0, 5) if rank == 0 else slice(5, 12))
    table.merge()
    table.merge()
    return {k: v.clone() for k, v in table.state_dict().items()}


def test_two_uneven_ranks_are_one_process(ranks):
    for seed in range(3):
        first, second = ranks.run(_merged, seed)
        whole = table_of(steps(seed)).state_dict()
        for name in whole:
            assert torch.equal(first[name][:7], whole[name][:7]), name
            assert torch.equal(second[name][:7], whole[name][:7]), name


def test_a_table_is_saved_and_restored_with_its_columns():
    table = table_of(steps())
    again = SampleTable(7)
    again.load_state_dict(table.state_dict())
    assert again.columns == ["value", "pair", "high"]
    assert torch.equal(again["pair"], table["pair"])
    with pytest.raises(DebiasError, match="as many samples as when the checkpoint was saved, 7, but got 8"):
        SampleTable(8).load_state_dict(table.state_dict())
    with pytest.raises(DebiasError, match="a recorded column"):
        table["nothing"]
    assert table.half()["value"].dtype == torch.float64


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def test_which_dataset_is_numbered():
    plain = TensorDataset(torch.zeros(4))
    tagged = tag(plain)
    assert numbered_dataset(tagged, "X") is tagged
    assert numbered_dataset(Subset(Subset(tagged, [3, 1, 0]), [1]), "X") is tagged
    joined = tag(ConcatDataset([tagged, tagged]))
    assert numbered_dataset(joined, "X") is joined
    for dataset, match in (
        (plain, r"its number in the dataset for X, but got TensorDataset.*`tag\(dataset\)`"),
        (Stream(), "map-style training set for X.*the stream Stream"),
        (ConcatDataset([tagged, tagged]), "joins 2 sets"),
    ):
        with pytest.raises(DebiasError, match=match):
            numbered_dataset(dataset, "X")
