"""Words as COCO's evaluation counts them: Penn Treebank tokens, lower case, punctuation dropped.

Written from the tokens that the Stanford tokenizer gives on probes, and tested against it. What is
not reproduced: smileys, the abbreviations of rarer kinds, telephone numbers.
"""

import re

# what pycocoevalcap drops; it compares "-LRB-" with lower-cased text, so parentheses are counted
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_SPELLED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    '"': "''", "“": "``", "”": "''", "‘": "`", "’": "'", "–": "--", "—": "--", "…": "...",
    "€": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4",
}  # fmt: skip
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|st|ave|rd|blvd|jr|sr|etc|vs|inc|co|corp|ltd|ft|jan|feb|mar|apr|jun|"
    "jul|aug|sept|sep|oct|nov|dec|gen|lt|col|capt|sgt|hon|rev|gov|sen|rep|al|dept|est|cf|"
    "mt|univ|bldg|bros|adm|maj|cpl|pres|mon|tue|wed|thu|fri|tel|ext"
)
_LETTER = r"[^\W_]"
_PART = rf"{_LETTER}+(?:_{_LETTER}+)*"
_TOKEN = re.compile(
    rf"""
    </?[a-z][^<>|]*>                                  # markup such as <image>
    | (?:https?://|www\.)[^\s"<>()]*[^\s"<>().,!?;:'] # addresses
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | [\#@][a-z]\w*
    | (?:{_ABBREVIATIONS})\.(?!\w)          # the full stop belongs to the word
    | ph\.d\. | (?:[a-z]\.){{2,}} | [a-z]\.(?!\w)
    | can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b) | lem(?=me\b) | gim(?=me\b)
    | 't(?=is\b|was\b) | 'n'(?!\w) | '(?:em|cause)\b
    | [a-z]+(?=n't\b) | n't\b | '(?:s|re|ve|ll|d|m)\b
    | [dlo]'[a-z]{{2,}} | ma'am\b | y'(?=all\b)
    | [a-z]+&[a-z]+
    | (?<!\S)[-+]?\d*(?:[.,:/]\d+)+(?:-[a-z]\w*)*     # 3.5, 10:30, 1/2-inch; a unit stands apart
    | \d+(?:[.,:/]\d+)+(?:-[a-z]\w*)*
    | (?<!\S)[-+]\d+(?!\w)
    | {_PART}(?:[-/]{_PART})*(?:\.[a-z]{_LETTER}*)*   # words; "lung.The" is one
    | \.\.\.+ | --+ | ``|'' | [!?]{{2,}} | <<|>>
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(text: str) -> list[str]:
    """Tokens of a text, as pycocoevalcap's PTBTokenizer gives them on ordinary sentences."""
    out = []
    for token in _TOKEN.findall(text.replace("’", "'")):
        token = _SPELLED.get(token, token.lower())
        if token not in _DROPPED and not token.startswith(("...", "--")):
            out.append(token)
    return out
