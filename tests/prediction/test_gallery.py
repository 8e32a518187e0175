"""Pages escape all text, and refer to no other files."""

import html.parser
import os

import pytest

from vlalign_jax.data.records import Options, parse_record
from vlalign_jax.prediction import gallery, metrics, reward_accuracy, reward_page
from vlalign_jax.prediction import records as data

EVIL = "</p><script>alert(\"1\")</script><img src='http://x/y.png' onerror=z> & <b>"
VOID = ("meta", "img")


class Page(html.parser.HTMLParser):
  """Collects tags, links and text, and checks that every tag is closed."""

  def __init__(self, content: str):
    super().__init__()
    self.tags, self.open, self.links, self.text = [], [], [], ""
    self.feed(content)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.links += [value for name, value in attributes if name in ("src", "href")]
    assert not any(name.startswith("on") for name, _ in attributes)
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, text):
    self.text += text


@pytest.fixture
def records(models):
  entry = {
    "id": EVIL,
    "image": "0.png",
    "system": f"{EVIL} be brief",
    "conversations": [
      {"from": "human", "value": f"<image>{EVIL}?"},
      {"from": "gpt", "value": f"{EVIL}!"},
      {"from": "human", "value": f"{EVIL}??"},
      {"from": "gpt", "value": [f"{EVIL}1", f"{EVIL}2"]},
    ],
  }
  options = Options(os.path.dirname(models.data), "optional")
  record, _ = parse_record(entry, models.data, 0, "record 0", options)
  missing = {**entry, "image": "missing.png"}
  broken, _ = parse_record(missing, models.data, 1, "record 1", options)
  return record, broken


def make_lines(records, **values) -> list[dict]:
  return [
    data.shown(number, record) | {"rank": rank, "answer": answer, "reward": float(rank)} | values
    for number, record in enumerate(records)
    for rank, answer in enumerate(record.answers)
  ]


def check(content: str) -> Page:
  page = Page(content)
  assert "script" not in page.tags
  assert "b" not in page.tags
  assert page.links
  assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
  assert "url(" not in content
  assert "@import" not in content
  return page


def test_gallery(models, records):
  lines = make_lines(records, reference=f"{EVIL}1", reason=EVIL)
  page = check(gallery.gallery(models.config(), lines, records, {EVIL: 1.5}))
  for text in (
    f"{EVIL} be brief",
    f"{EVIL}?",
    f"{EVIL}!",
    f"{EVIL}??",
    f"{EVIL}1",
    f"{EVIL}2",
    f"({EVIL})",
    "1.5",
  ):
    assert text in page.text
  assert page.tags.count("section") == 2
  assert 'image "missing.png" under' in page.text  # its name, and the page continues


def test_number_of_records(models, records):
  page = check(gallery.gallery(models.config(gallery=1), make_lines(records), records, {}))
  assert page.tags.count("section") == 1
  assert "1 of 2 records" in page.text


def test_reward_page(models, records):
  lines = make_lines(records)
  pairs = metrics.ranked_pairs(lines)
  numbers = reward_accuracy.evaluate(lines, pairs)
  config = models.config(**{"data.eval": EVIL})
  page = check(reward_page.page(config, numbers, pairs, records, 5))
  assert f"{EVIL}1" in page.text
  assert page.tags.count("section") == 2
  assert page.tags.count("circle") == 1


def test_one_score_for_all(models, records):
  """Draws a histogram without a range, and calls only ties wrong."""
  lines = [line | {"reward": 0.25} for line in make_lines(records)]
  pairs = metrics.ranked_pairs(lines)
  numbers = reward_accuracy.evaluate(lines, pairs)
  check(reward_page.page(models.config(), numbers, pairs, records, 1))
