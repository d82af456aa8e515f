"""The rule-based corrector keeps the student's wording and never its mistakes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.data.boxes import stated_boxes
from clinkd.train.correction.facts import contradiction, new_numbers
from clinkd.train.correctors import Case
from clinkd.train.correctors.rule import RuleCorrector, rewrite

BOX = "<|box_start|>(10,20),(300,400)<|box_end|>"
WRONG = "<|box_start|>(500,500),(510,520)<|box_end|>"
RC = (
    "This is the colon, a large structure in the upper part of the image. "
    "It is darker than its surroundings, next to the small bowel."
)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        # the wording of the student, its box replaced
        (
            f"You can find the left femur at {WRONG}.",
            f"The left femur is located at {BOX}.",
            f"You can find the left femur at {BOX}.",
        ),
        # … and the name as well
        (
            f"You can find the right femur at {WRONG}.",
            f"The left hip bone is located at {BOX}.",
            f"You can find the left hip bone at {BOX}.",
        ),
        ("This is the spleen.", "Left femur.", "This is the left femur."),
        ("Spleen.", "This is the left femur.", "This is the left femur."),  # a verb is missing
        ("It is an MR image of the head.", "It is a CT image of the pelvis.", None),
        ("This is a tumour.", "An enlarged node.", "This is an enlarged node."),
        ("This is an MR image.", "CT image.", "This is a CT image."),
        # the article is the truth's own, else after its sound
        ("This is a CT image.", "It is an MR image.", "This is an MR image."),
        ("This is a CT image.", "X-ray image.", "This is an X-ray image."),
        ("It is a CT image.", "T1-weighted image.", "It is a T1-weighted image."),
        ("It is a CT image.", "US image.", "It is a US image."),
        ("It is an aorta.", "The urinary bladder.", "It is a urinary bladder."),
        ("It is a spleen.", "Axial plane.", "It is an axial plane."),
        # a sign belongs to its number
        ("The density is 20 HU.", "The density is -20 HU.", None),
        ("It is -20 HU here.", "The density is 20 HU.", None),
        ("It is >5 mm.", "It is <5 mm.", None),
        # several pieces, each between the same words
        (
            "This is the liver, a small structure in the lower part of the image. It is brighter "
            "than its surroundings, next to the aorta.",
            RC,
            RC,
        ),
        # one sentence of the student is right, the other is not and does not fit
        ("It shows the colon. Nothing else.", "It shows the colon.", "It shows the colon."),
        # claims that the truth does not make are left out
        (f"The colon is at {WRONG}. It is ill.", f"The colon is at {BOX}.", None),
        # no box, no verb, a stutter, markup, cut off: not fit to be learnt from
        ("The left femur at.", f"The left femur is at {BOX}.", None),
        (f"The left femur at {WRONG}.", f"The left femur is at {BOX}.", None),
        (f"The the left femur is found at {WRONG}.", f"The left femur is at {BOX}.", None),
        (f"The left femur is found at {WRONG}", f"The left femur is at {BOX}.", None),
        (f"The left<|im_end|> femur is found at {WRONG}.", f"The left femur is at {BOX}.", None),
        # number of the verb
        (f"Here is the kidney: {WRONG}.", f"The kidneys are at {BOX}{BOX}.", None),
        (f"Here are the lungs: {WRONG}.", f"The kidneys are at {BOX}{BOX}.", "K"),
        ("It is a liver.", "Lungs.", None),
        ("This is the spleen.", "Caudate nuclei.", None),
        ("This is the spleen.", "Pancreas.", "This is the pancreas."),
        ("Here are livers.", "Lungs.", "Here are lungs."),
        # which is that of the first noun, and not of a verb with another subject
        ("We see a CT image of the lungs.", "CT of lungs.", "We see a CT image of the lungs."),
        ("It shows the liver.", "Lungs.", "It shows the lungs."),
        (f"You can find lungs at {WRONG}.", f"Lungs: {BOX}.", f"You can find lungs at {BOX}."),
        ("It is ill.", "This is a liver.", None),
        ("This is the spleen.", "1. Liver", None),
        # no article before another determiner, no question for a statement
        ("This is the liver.", "No lesion.", None),
        ("The spleen is seen.", "No lesion is seen.", None),
        ("Is this the liver?", "This is the liver.", None),
        ("", RC, None),
        ("\0\0", RC, None),
    ],
)
def test_rewrite(answer, truth, expected):
    if expected == "K":
        expected = f"Here are the kidneys: {BOX}{BOX}."
    elif expected is None and truth.startswith("It is a CT"):
        expected = "It is a CT image of the pelvis."
    assert rewrite(answer, truth) == (truth if expected is None else expected)


def test_lines_of_the_truth_stay_lines():
    truth = f"Findings:\n- liver {BOX}\n  - spleen\n\nThis is a CT image. It is normal."
    assert rewrite("", truth) == truth
    assert rewrite("It is ill.", truth) == truth
    assert rewrite("Here is a liver.", truth.split("This")[0]) == truth.split("This")[0]
    answer = "The image is an MR image."
    assert rewrite(answer, truth) == truth.replace("This is a CT", "The image is a CT")


def test_roles_do_not_swap():
    truth = "This is a CT image of the pelvis."
    assert rewrite("The pelvis is seen on this CT.", truth) == truth


def test_every_box_goes_back_to_its_place():
    second = "<|box_start|>(1,2),(3,4)<|box_end|>"
    truth = f"The left kidney is at {BOX} and the right kidney is at {second}."
    assert rewrite("", truth) == truth
    truth = f"The left kidney is at {BOX}. The right kidney is at {second}."
    answer = f"You can find the right kidney at {WRONG}. You can find the left kidney at {WRONG}."
    assert rewrite(answer, truth) == (
        f"You can find the left kidney at {BOX}. You can find the right kidney at {second}."
    )


def test_answers_of_a_batch_come_in_order_and_progress_is_told():
    told = []
    cases = [Case(str(i), "ROC", "q", "", f"Name {i}.") for i in range(3)]
    replies = RuleCorrector().correct(cases, lambda *a: told.append(a))
    assert [r.text for r in replies] == ["Name 0.", "Name 1.", "Name 2."]
    assert told == [(3, 3, "correcting")]


PLAIN = "the a is at left right colon femur small large next to in of image it shows no 3 -3"
MARKS = (BOX, WRONG, "(1,2),\n(3,4)", "(1,2),(3,4)", "<|im_end|>", ".", ",", "\0", "\n")
WORDS = st.sampled_from([*PLAIN.split(), *MARKS])
TEXTS = st.lists(WORDS, max_size=14).map(" ".join)


@given(answer=TEXTS, truth=TEXTS)
def test_never_says_what_the_truth_does_not(answer, truth):
    result = rewrite(answer, truth)
    boxes = [(b.form, b.corners) for b in stated_boxes(result)]
    assert boxes == [(b.form, b.corners) for b in stated_boxes(truth)]
    assert new_numbers(result, truth) == set()
    assert contradiction(result, truth) is None
    # a name may have become the first word of a sentence
    assert set(re.findall("colon|femur", result.lower())) == set(re.findall("colon|femur", truth))
