"""Where a response to the embedded task stops being sound, which the signals of drift are held against."""

from __future__ import annotations

import pytest

from prune_opd.data.tasks import Problem, sound_words

PROBLEM = Problem((3, 5, 9))  # b 3 + 5 = 8 c 8 + 9 = 7 \boxed{ 7 } <eos>
SOLUTION = [*PROBLEM.solution.split(), "<eos>"]


@pytest.mark.parametrize(
    ("response", "sound"),
    [
        (SOLUTION, len(SOLUTION)),
        (SOLUTION[:8], 8),  # cut, and right so far
        ([*SOLUTION[:5], "7", "c", "7"], 5),  # a wrong sum
        ([*SOLUTION[:6], "wait", "under", "until"], 6),  # lost for good: from the first word that leads nowhere
        ([*SOLUTION[:6], "wait", "so", *SOLUTION[6:]], len(SOLUTION) + 2),  # lost, and taken up again
        ([*SOLUTION[:6], "wait", "so", "d", "8"], 6),  # taken up at a wrong step
        ([*SOLUTION[:-1], "so", "well"], len(SOLUTION) - 1),  # past the answer
        ([*SOLUTION, "b"], len(SOLUTION)),
        ([], 0),
    ],
)
def test_sound_words_end_where_the_thread_is_lost_for_good(response, sound):
    assert sound_words(PROBLEM, response) == sound
