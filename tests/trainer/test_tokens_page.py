"""The page of coloured tokens: self-contained, escaped, every token with its entropy."""

import math
import re
from html.parser import HTMLParser

import pytest

from trainer.config import Reward
from trainer.log import Sample
from trainer.studies.analyze.tokens_page import TOKENS_A_RESPONSE, write_tokens_page

HOSTILE = ["</script>", "<b>", '"', "\x1b[0m", "a\nb", "&amp;"]


def sample(tokens, entropy, reward=1.0):
    return Sample("1 > 2\n<i>", "".join(tokens), reward, tokens, entropy, [False] * len(tokens))


class Tokens(HTMLParser):
    """(text, data-h, class) of every <i> inside a response, and all other tags."""

    def __init__(self, text):
        super().__init__()
        self.found, self.tags, self._open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._open = tag == "i"
        if self._open:
            given = dict(attributes)
            self.found.append(["", given["data-h"], given["class"]])

    def handle_endtag(self, tag):
        self._open = self._open and tag != "i"

    def handle_data(self, data):
        if self._open:
            self.found[-1][0] += data


def page(tmp_path, samples, threshold=0.5, **reward):
    path, reward = tmp_path / "x.html", Reward(**reward)
    return write_tokens_page(path, samples, threshold, "a <model>", reward).read_text()


def test_every_token_stands_with_its_entropy(tmp_path):
    entropy = [0.0, 0.25, 2.0, 0.01, 0.5, 1.0]
    found = Tokens(page(tmp_path, [sample(HOSTILE, entropy)])).found
    shown = ["</script>", "<b>", '"', "\u241b[0m", "a↵\nb", "&amp;"]
    assert [text for text, *_ in found] == shown
    assert [float(h) for _, h, _ in found] == entropy
    levels = [int(name[1:]) for *_, name in found]
    assert [x for _, x in sorted(zip(entropy, levels, strict=True))] == sorted(levels)
    assert (min(levels), max(levels)) == (0, 10)


def test_nothing_is_fetched_and_nothing_escapes(tmp_path):
    text = page(tmp_path, [sample(HOSTILE, [0.1] * 6), sample(["x"], [0.2], 0.0)])
    tags = Tokens(text).tags
    assert tags.count("script") == 1
    assert "b" not in [tag for tag in tags if tag in ("img", "link", "iframe")]
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", text)
    assert text.count('class="is-right"') == text.count('class="is-wrong"') == 1


def test_entropies_that_are_not_finite_have_no_colour(tmp_path):
    found = Tokens(page(tmp_path, [sample(["a", "b", "c"], [math.nan, 0.3, None])])).found
    assert [h for _, h, _ in found] == ["", "0.3", ""]
    assert [name for *_, name in found] == ["hnone", "h10", "hnone"]


def test_the_slider_starts_at_the_threshold_and_reaches_the_greatest(tmp_path):
    text = page(tmp_path, [sample(["a", "b"], [0.3, 1.7])], threshold=0.672)
    assert 'data-start="0.672"' in text
    assert 'data-greatest="1.7"' in text


def test_long_responses_are_cut_and_say_so(tmp_path):
    count = TOKENS_A_RESPONSE + 3
    text = page(tmp_path, [sample(["a"] * count, [0.1] * count)])
    assert len(Tokens(text).found) == TOKENS_A_RESPONSE
    assert "3 more tokens" in text


def test_no_response_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        page(tmp_path, [])
