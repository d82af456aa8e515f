"""Which candidate is chosen."""

import pytest

from clinkd.generate import Candidate, select
from clinkd.generate.select import box_similarity, truth_quality, word_similarity


def candidates(*texts, scores=None):
    scores = scores or [-0.1 * i for i in range(len(texts))]
    return [Candidate(t, [1], [s], s) for t, s in zip(texts, scores, strict=True)]


BOX = "<|box_start|>({},{}),({},{})<|box_end|>"


def test_beam_takes_the_best_score():
    assert select(candidates("a", "b", scores=[-2.0, -1.0]), "beam") == 1


def test_clip_takes_the_highest_cosine():
    assert select(candidates("a", "b", "c"), "clip", clip=[0.1, 0.3, 0.2]) == 1
    assert select(candidates("a", "b"), "clip", clip=[-0.3, -0.2]) == 1  # not cut off at 0


def test_ties_go_to_the_beam_score_then_the_index():
    tied = candidates("a", "b", "c", scores=[-2.0, -1.0, -1.0])
    assert select(tied, "clip", clip=[0.5, 0.5, 0.5]) == 1
    assert select(tied, "consensus") == 1


@pytest.mark.parametrize(("mix", "chosen"), [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_mixed_weighs_clip_against_beam(mix, chosen):
    found = candidates("a", "b", "c", scores=[-1.0, -1.2, -3.0])
    assert select(found, "mixed", clip=[0.0, 0.8, 1.0], mix=mix) == chosen


def test_consensus_of_boxes():
    found = candidates(BOX.format(900, 900, 950, 950), BOX.format(0, 0, 100, 100), "in the middle")
    found += candidates(BOX.format(0, 0, 100, 110))
    assert select(found, "consensus", task="VG") in (1, 3)


def test_consensus_of_words():
    found = candidates("a kidney", "the left lung is dark", "the left lung is bright")
    assert select(found, "consensus", task="RC") in (1, 2)


def test_oracle_knows_the_truth():
    found = candidates("the spleen", "the left kidney", "the liver")
    assert select(found, "oracle", quality=truth_quality("ROC", "Left kidney")) == 1
    with pytest.raises(ValueError, match="oracle' needs the truth"):
        select(found, "oracle")


@pytest.mark.parametrize("clip", [None, [0.1], [0.1, None], [0.1, float("nan")]])
def test_scores_that_are_missing_or_nan_are_refused(clip):
    with pytest.raises(ValueError, match="needs a finite CLIP score of every candidate"):
        select(candidates("a", "b"), "clip", clip=clip)


def test_no_candidate():
    with pytest.raises(ValueError, match="no candidate to select from"):
        select([], "beam")


def test_similarities():
    same = BOX.format(0, 0, 100, 100)
    assert box_similarity(same, same) == 1
    assert box_similarity(same, "nothing") == 0
    assert box_similarity(same, same + BOX.format(500, 500, 600, 600)) == pytest.approx(2 / 3)
    assert word_similarity("The liver " + same, "the liver") == 1
    assert word_similarity("", "") == 0
