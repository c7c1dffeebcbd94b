"""Batches: a function of seed and sequence number, so the same for every layout, and resumable anywhere."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from shardplan.executor.loader import MIX_BLOCK, Loader, shares
from shardplan.executor.token_files import TokenFile, TokenWriter, open_tokens
from shardplan.hw_profiles.errors import InputError

SEQ = 8


@pytest.fixture
def write(tmp_path):
    """Writes a file whose tokens count up from `base`, in documents of these lengths."""

    def make(name: str, lengths: list[int], *, base: int = 0) -> TokenFile:
        writer = TokenWriter(tmp_path / f"{name}.bin", vocabulary=60_000)
        for length in lengths:
            writer.write(list(range(base, base + length)))
            writer.end_document()
            base += length
        writer.close()
        return open_tokens(tmp_path / f"{name}.bin")

    return make


def make_loader(files, weights=None, *, global_batch=8, seed=3, vocabulary=60_000, **words) -> Loader:
    return Loader(
        files,
        weights or [1.0] * len(files),
        seq=SEQ,
        global_batch=global_batch,
        vocabulary=vocabulary,
        seed=seed,
        **words,
    )


def lengths(count: int) -> list[int]:
    return np.random.default_rng(0).integers(1, 40, count).tolist()


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_the_global_batch_is_the_same_for_every_number_of_ranks(write, dp):
    files = [write("a", lengths(30)), write("b", lengths(20), base=10_000)]
    whole = make_loader(files, [2, 1])
    ranks = [make_loader(files, [2, 1]) for _ in range(dp)]
    share = 8 // dp
    for step in (1, 2, 30):
        inputs, targets = whole.batch(step, first=0, count=8)
        split = [loader.batch(step, first=rank * share, count=share) for rank, loader in enumerate(ranks)]
        assert np.array_equal(np.concatenate([x for x, _ in split]), inputs)
        assert np.array_equal(np.concatenate([y for _, y in split]), targets)
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])


def test_another_seed_is_another_order(write):
    file = write("a", lengths(30))
    assert not np.array_equal(
        make_loader([file]).batch(1, first=0, count=8), make_loader([file], seed=4).batch(1, first=0, count=8)
    )


def test_an_epoch_holds_every_window_once_and_the_next_has_another_order(write):
    file = write("a", lengths(30))
    loader = make_loader([file])
    per_epoch = loader.sources[0].per_epoch
    assert per_epoch == (len(file.tokens) - 1) // SEQ
    epochs = [
        [tuple(loader.sequence(epoch * per_epoch + i)[0][:SEQ].tolist()) for i in range(per_epoch)] for epoch in (0, 1)
    ]
    for windows in epochs:
        tokens = [token for window in windows for token in window]
        assert len(set(tokens)) == len(tokens)  # every token of the file is another number
        assert len(file.tokens) - len(tokens) <= SEQ
    assert epochs[0] != epochs[1]


def test_windows_hold_whole_runs_of_documents_and_say_where_they_begin(write):
    file = write("a", lengths(30))
    loader = make_loader([file])
    begins = set(file.starts[:-1].tolist())
    for number in range(loader.sources[0].per_epoch):
        tokens, starts = loader.sequence(number)
        assert len(tokens) == SEQ + 1
        assert [int(tokens[at]) for at in starts] == [int(t) for t in tokens if int(t) in begins]
        jumps = set((np.flatnonzero(np.diff(tokens) != 1) + 1).tolist())
        assert jumps <= set(starts)  # tokens count on, except where a document begins


def test_windows_follow_one_another_without_shuffling(write):
    file = write("a", [100])
    loader = make_loader([file], shuffle=False)
    inputs, targets = loader.batch(1, first=0, count=3)
    assert inputs.ravel().tolist() == list(range(24))
    assert targets.ravel().tolist() == list(range(1, 25))


def test_weights_hold_over_a_block_and_each_file_goes_on_where_it_was(write):
    files = [write("a", lengths(40)), write("b", lengths(40), base=10_000)]
    loader = make_loader(files, [3, 1])
    assert loader.quotas == [3 * MIX_BLOCK // 4, MIX_BLOCK // 4]
    places = [loader._place(number) for number in range(2 * MIX_BLOCK)]
    assert Counter(which for which, _ in places) == {0: 2 * loader.quotas[0], 1: 2 * loader.quotas[1]}
    for which in (0, 1):
        assert [index for at, index in places if at == which] == list(range(2 * loader.quotas[which]))


def test_shares_are_whole_and_at_least_one():
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([1, 1e-9], 10) == [9, 1]
    assert sum(shares([0.7, 0.2, 0.1], 4096)) == 4096


@pytest.mark.parametrize("stop", [1, 5, 11, 600])
def test_a_restored_loader_goes_on_exactly_where_the_other_stopped(write, stop):
    """In the middle of an epoch, and after several: 40 documents are about 100 windows, 600 steps of 8 many epochs."""
    files = [write("a", lengths(40)), write("b", lengths(40), base=10_000)]
    whole = make_loader(files, [3, 1])
    kept = json.loads(json.dumps(whole.state(stop)))
    again = make_loader(files, [3, 1])
    again.restore(kept)
    for step in (stop + 1, stop + 2, stop + 40):
        assert np.array_equal(whole.batch(step, first=0, count=8), again.batch(step, first=0, count=8))
    assert again.state(stop + 7) == whole.state(stop + 7)
    assert kept["sequences"] == 8 * stop
    drawn = [one["epoch"] * s.per_epoch + one["position"] for one, s in zip(kept["files"], whole.sources, strict=True)]
    assert sum(drawn) == 8 * stop


def test_another_global_batch_goes_on_with_the_next_sequence(write):
    file = write("a", lengths(40))
    first, then = make_loader([file], global_batch=8), make_loader([file], global_batch=4)
    then.restore(first.state(3))
    found = np.concatenate([then.batch(step, first=0, count=4)[0] for step in (4, 5)])
    assert np.array_equal(found, first.batch(4, first=0, count=8)[0])


def test_the_state_of_other_data_is_refused(write):
    one, other = write("a", lengths(40)), write("b", lengths(40))
    state = make_loader([one]).state(5)
    for loader, told in (
        (make_loader([other]), r"files.name=\['a.bin'\] where the training stopped, \['b.bin'\] now"),
        (make_loader([one], seed=9), "seed=3 where the training stopped, 9 now; give the same data and seed"),
        (make_loader([one, other]), "files.name="),
    ):
        with pytest.raises(InputError, match=told):
            loader.restore(state)


def test_a_file_shorter_than_a_sequence_is_refused(write):
    with pytest.raises(
        InputError, match="8 tokens are less than one sequence of 8 and its last target; give a file of 9"
    ):
        make_loader([write("a", [8])])
    assert make_loader([write("b", [9])]).sources[0].per_epoch == 1


def test_a_token_beyond_the_vocabulary_is_found_when_it_is_read(write):
    loader = make_loader([write("a", [100])], vocabulary=50)
    with pytest.raises(
        InputError, match=r"a.bin: token (\d+) at position \1 is not below the model's vocabulary of 50"
    ):
        [loader.sequence(number) for number in range(12)]
