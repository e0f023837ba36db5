"""What is set apart to choose by, and when a run ends."""

from contextlib import nullcontext

import numpy as np
import pytest
from families import character_tokenizer, tiny_model
from test_evaluation import nats_of

from dbes.finetuning.settings import make_settings
from dbes.finetuning.validation import best_step, check_every, split_validation, stalled, validation_loss
from dbes.tasks.entries import Entry


class Alone:
    """An accelerator of one process."""

    num_processes, process_index = 1, 0

    def autocast(self):
        return nullcontext()


def entries(sources, letters=60, per_source=1):
    return [
        Entry(id=f"{place}-{part}", source=str(place), segments=((chr(97 + place % 26) * letters, True),))
        for place in range(sources)
        for part in range(per_source)
    ]


def split(given, **changes):
    return split_validation(given, character_tokenizer(), make_settings(**{"seq_len": 16, "packing": False, **changes}))


def letters(samples):
    return {int(token) for sample in samples for token in sample.ids[1:-1]}


def test_whole_texts_are_set_apart_where_there_are_enough():
    found = split(entries(26, per_source=2))
    assert found.unit == "texts"
    assert not letters(found.training) & letters(found.validation)
    assert len(letters(found.validation)) == 3, "a tenth of 26"
    again = split(list(reversed(entries(26, per_source=2))))
    assert letters(again.validation) == letters(found.validation), "the same ones in any order"


def test_sequences_are_set_apart_where_texts_are_few():
    found, whole = split(entries(3, letters=150)), split(entries(3, letters=150), early_stopping=False, lr=1e-3)
    assert found.unit == "sequences" and whole.unit == "nothing"
    assert len(found.training) + len(found.validation) == len(whole.training)
    assert len(found.validation) == round(len(whole.training) / 10)
    assert len(letters(found.validation)) == 3, "evenly spread over the texts"


def test_nothing_is_set_apart_of_too_little_or_where_nothing_is_chosen():
    assert split(entries(1)).unit == "nothing"
    assert split(entries(40), early_stopping=False, lr=1e-3).unit == "nothing"
    assert split(entries(40), early_stopping=False).unit == "texts", "the learning rate is still to be found"
    assert split(entries(40), lr=1e-3).unit == "texts"


def test_so_much_validation_text_is_enough():
    assert len(split(entries(300, letters=100)).validation) == 64


def test_the_loss_is_that_of_all_counted_tokens():
    model = tiny_model("olmoe").train()
    samples = split(entries(22)).validation
    found = validation_loss(model, samples, padding=0, accelerator=Alone())
    assert model.training
    model.eval()
    nats = sum(nats_of(model, sample.ids.tolist(), int(np.argmax(sample.counted))) for sample in samples)
    assert found == pytest.approx(nats / sum(int(sample.counted.sum()) for sample in samples), rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "patience", "best", "ends"),
    [
        ([3.0], 1, 0, False),
        ([3.0, 2.9, 2.8], 1, 20, False),
        ([3.0, 2.9, 2.95], 1, 10, True),
        ([3.0, 2.9, 2.95], 2, 10, False),
        ([3.0, 2.9, 2.95, 2.9], 2, 10, True),
        ([3.0, 2.9, 2.95, 2.89], 2, 30, False),
        ([3.0, 3.1, 3.2], 2, 0, True),
    ],
)
def test_a_run_ends_when_its_lowest_loss_is_so_many_checks_old(losses, patience, best, ends):
    pairs = [(10 * place, loss) for place, loss in enumerate(losses)]
    assert (best_step(pairs), stalled(pairs, patience)) == (best, ends)


@pytest.mark.parametrize(
    ("steps", "sequences", "every"),
    [(200, 6, 10), (10, 6, 2), (7, 64, 7), (200, 64, 14), (10_000, 64, 500), (1, 1, 1)],
)
def test_checks_take_at_most_a_fifth_of_the_work(steps, sequences, every):
    assert check_every(steps, sequences=sequences, batch_size=8) == every
