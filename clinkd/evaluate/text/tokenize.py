"""Words as COCO's evaluation counts them: Penn Treebank tokens, lower case, punctuation dropped."""

import re

# what pycocoevalcap drops; it lower-cases first, so that "-lrb-" (a parenthesis) stays
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TOKEN = re.compile(
    r"""
    [a-z]+n't(?![a-z])(?<=n't)            # contractions are split below
    | \d+(?:[.,/:]\d+)*(?:-?[a-z]+)*%?    # numbers, with units and ratios
    | [a-z](?:\.[a-z])+\.?                # abbreviations such as e.g.
    | [^\W\d_]+(?:[-_/][^\W_]+)*          # words, joined ones kept whole
    | '(?:s|re|ve|ll|d|m)(?![a-z])
    | \.\.\.+ | --+ | ``|''
    | \S
    """,
    re.VERBOSE,
)
_NOT = re.compile(r"([a-z]+)n't$")


def tokenize(text: str) -> list[str]:
    """Tokens of a text, as pycocoevalcap's PTBTokenizer gives them on ordinary sentences."""
    out = []
    for token in _TOKEN.findall(text.lower().replace("\n", " ")):
        if match := _NOT.match(token):
            out += [match[1], "n't"]
            continue
        token = _BRACKETS.get(token, token)
        if token not in _DROPPED and not token.startswith(("...", "--")):
            out.append(token)
    return out
