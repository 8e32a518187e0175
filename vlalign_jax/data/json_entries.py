"""Reads JSON arrays and JSON lines piece by piece, so that a file is never in memory as a whole."""

import codecs
import json
from collections.abc import Iterator
from typing import Any

from vlalign_jax.errors import InputError

_CHUNK = 1 << 20  # characters read at a time
_UNFINISHED = "Unterminated string"  # json's message where the text may only have been cut
_SPACE = " \t\r\n"
_AFTER = (*_SPACE, ",", "]")


def lines(path: str) -> Iterator[tuple[int, str, Any]]:
  """Yields (line number from 1, "line N", parsed JSON) of every line that is not blank.

  In place of a line that is malformed or not UTF-8 comes an InputError that names it.

  Raises:
    InputError: the file cannot be read.
  """
  with _opened(path) as file:
    for number, content in enumerate(file, start=1):  # U+2028 does not end a line of bytes
      content = content.removeprefix(codecs.BOM_UTF8) if number == 1 else content
      if not content.strip():
        continue
      place = f"line {number}"
      try:
        yield number, place, json.loads(content.decode())
      except UnicodeDecodeError:
        reason = "is not UTF-8; convert the file to UTF-8"
        yield number, place, InputError(f"{path}, {place}: {reason}")
      except json.JSONDecodeError as error:
        reason = f"malformed JSON at column {error.colno} ({error.msg}); fix it"
        yield number, place, InputError(f"{path}, {place}: {reason}")
      except (ValueError, RecursionError) as error:
        yield number, place, InputError(f"{path}, {place}: malformed JSON ({error}); fix it")


def array(path: str) -> Iterator[tuple[int, str, Any]]:
  """Yields (index from 0, "record I", parsed JSON) of every element of a JSON array.

  Raises:
    InputError: the file cannot be read, or is malformed from some element on.
  """
  with _opened(path) as file:
    text = _Text(path, file)
    text.skip_space()
    if text.take() != "[":
      raise InputError(f"{path}: is not a list of records; wrap them in [ ]")
    text.skip_space()
    if text.peek() == "]":
      text.take()
    else:
      index = 0
      while True:
        yield index, f"record {index}", text.element()
        text.skip_space()
        if (mark := text.take()) == "]":
          break
        if mark != ",":
          raise text.error("Expecting ',' delimiter" if mark else "the list has no end", -1)
        text.skip_space()
        index += 1
    text.skip_space()
    if text.peek():
      raise text.error("Extra data")


class _Text:
  """The decoded text of a file from some place on; more is read as it is needed."""

  def __init__(self, path: str, file):
    self._path, self._file = path, file
    self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
    self._json = json.JSONDecoder()
    self._buffer, self._at = "", 0
    self._line, self._column = 1, 1  # of the buffer's first character
    self._bytes_lines, self._ended = 1, False

  def peek(self) -> str:
    """Returns the next character; "" at the end of the file."""
    while self._at == len(self._buffer) and self._read():
      pass
    return self._buffer[self._at : self._at + 1]

  def take(self) -> str:
    """Returns the next character and goes on behind it; "" at the end of the file."""
    character = self.peek()
    self._at += len(character)
    return character

  def skip_space(self) -> None:
    """Goes on to the next character that is not white space."""
    while (character := self.peek()) and character in _SPACE:
      self._at += 1

  def element(self) -> Any:
    """Parses the JSON value that begins here, and goes on behind it.

    Raises:
      InputError: it is malformed.
    """
    while True:
      try:
        value, end = self._json.raw_decode(self._buffer, self._at)
      except json.JSONDecodeError as error:
        # An element that the buffer cuts fails near its end, or where its last string begins.
        offset = error.pos - self._at
        is_cut = error.pos >= len(self._buffer) - 16 or error.msg.startswith(_UNFINISHED)
        if not is_cut or not self._read():
          raise self.error(error.msg, offset) from error
      except (ValueError, RecursionError) as error:
        raise InputError(f"{self._path}: malformed JSON ({error}); fix it") from error
      else:
        # Only what follows shows that a number is complete.
        is_number = isinstance(value, (int, float)) and self._buffer[end : end + 1] not in _AFTER
        if not is_number or not self._read():
          self._at = end
          return value

  def error(self, message: str, offset: int = 0) -> InputError:
    """Returns the error for malformed JSON `offset` characters from here."""
    before = self._buffer[: self._at + offset]
    line = self._line + before.count("\n")
    column = len(before) - before.rfind("\n") if "\n" in before else self._column + len(before)
    return InputError(
      f"{self._path}: malformed JSON at line {line}, column {column} ({message}); fix it"
    )

  def _read(self) -> bool:
    """Reads on; returns whether there was more. Doubles, so that a long element costs no more."""
    if self._ended:
      return False
    self._forget()
    content = self._file.read(max(_CHUNK, len(self._buffer)))
    self._ended = not content
    try:
      self._buffer += self._decoder.decode(content, final=self._ended)
    except UnicodeDecodeError as error:
      # The decoder may have kept the first bytes of a character; they hold no line's end.
      line = self._bytes_lines + error.object.count(b"\n", 0, error.start)
      message = f"line {line} is not UTF-8; convert the file to UTF-8"
      raise InputError(f"{self._path}: {message}") from error
    self._bytes_lines += content.count(b"\n")
    return bool(content)

  def _forget(self) -> None:
    """Drops what was read before this place."""
    before = self._buffer[: self._at]
    if "\n" in before:
      self._line += before.count("\n")
      self._column = len(before) - before.rfind("\n")
    else:
      self._column += len(before)
    self._buffer, self._at = self._buffer[self._at :], 0


def _opened(path: str):
  try:
    return open(path, "rb")
  except FileNotFoundError as error:
    raise InputError(f"{path}: no such file; check data.train and data.eval") from error
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror})") from error
