"""Questions and answers in several wordings, chosen by a hash of the record's id."""

import hashlib
from collections.abc import Sequence

VG_QUESTIONS = (
    "Where is the {name} in this image?",
    "Locate the {name}.",
    "Please find the {name} and give its bounding box.",
    "Can you point out the {name}?",
    "In which part of the image is the {name}?",
    "Show me the position of the {name}.",
    "Give the coordinates of the {name}.",
)
VG_ANSWERS = (
    "The {name} is located at {boxes}.",
    "The {name} is at {boxes}.",
    "You can find the {name} at {boxes}.",
)
VG_PAIR_QUESTIONS = (
    "Where are the {name} in this image?",
    "Locate both {name}.",
    "Give the bounding boxes of the {name}.",
    "Please find the {name} on both sides.",
    "Show me the positions of the {name}.",
    "Can you point out the {name}?",
)
VG_PAIR_ANSWERS = ("The {name} are located at {boxes}.", "The {name} are at {boxes}.")
ROC_QUESTIONS = (
    "What is in the region {boxes}?",
    "Which structure lies at {boxes}?",
    "Name the object inside {boxes}.",
    "What does the box {boxes} contain?",
    "Identify the structure in {boxes}.",
    "What can be seen at {boxes}?",
)
RC_QUESTIONS = (
    "Describe the region {boxes}.",
    "What are the characteristics of the area {boxes}?",
    "Give a description of the structure at {boxes}.",
    "Please describe what lies within {boxes}.",
    "How does the region {boxes} look?",
    "Describe the content of the box {boxes}.",
)
RC_ANSWERS = (
    "This is the {name}, a {size} structure in the {place} of the image. It is {tone} its "
    "surroundings{near}.",
    "The region shows the {name}. It is {size}, lies in the {place} of the image and is {tone} its "
    "surroundings{near}.",
)
MIA_QUESTIONS = (
    "Describe this image.",
    "What can be interpreted from this image?",
    "What does this image show?",
    "Summarise the findings of this image.",
    "Which modality is this, and what can be seen?",
    "Please explain what is visible here.",
    "Give a short description of the image.",
)
MIA_ANSWERS = (
    "This is {article} {plane}{modality} image of {region}.{seen}",
    "The image is {article} {plane}{modality} image that shows {region}.{seen}",
)
MODALITY_QUESTIONS = (
    "Which imaging modality was used?",
    "What kind of image is this?",
    "How was this image taken, and of which part of the body?",
    "Name the modality and the region.",
    "With which technique was this image made?",
    "What type of scan is this?",
)
MODALITY_ANSWERS = ("It is {article} {modality} image of {region}.",)


def choose(options: Sequence[str], key: str) -> str:
    """One of the wordings, always the same for the same key."""
    digest = hashlib.sha256(key.encode()).digest()
    return options[int.from_bytes(digest[:4], "big") % len(options)]


def article(words: str) -> str:
    """a or an; "X-ray" and "MR" are spoken with a vowel."""
    vowel = words[0].lower() in "aeiou" or words.startswith(("X-ray", "MR"))
    return "an" if vowel else "a"


def join(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
