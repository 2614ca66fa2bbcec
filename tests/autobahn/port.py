"""Makes an installed autobahntestsuite, which is Python 2, run under Python 3.

    python port.py            (in the virtual environment that it is installed in)

The syntax is the work of fissix (lib2to3). What that cannot know is that a Python 2 string is made
of bytes. So the suite keeps such strings, one character (U+0000 to U+00FF, Latin-1) for each byte,
and they are turned into bytes and back at its borders: where it calls the WebSocket library, where
the library calls it, and at hashes, codecs and dumps. The cases themselves stay as they are. On
the suite's own server, the verdicts of the 301 cases outside the compression groups (12 and 13) were
those that they have under Python 2.7.
"""

import importlib.util
import pathlib
import re
import sys

from fissix.refactor import RefactoringTool, get_fixers_from_package

# The replacements: (file name or None for every file, pattern, replacement).
BORDERS = [
    (None, r"\bbinascii\.(b2a_hex|hexlify)\(", r"_borders.hexadecimal("),
    (None, r"([\w.\[\]:]+)\.decode\(", r"_borders.octets(\1).decode("),
    (None, r"\bm\.update\((\w+)\)", r"m.update(_borders.octets(\1))"),
    (None, r"\bv\.validate\(([^()]+)\)", r"v.validate(_borders.octets(\1))"),
    # The suite compares dumps. In Python 3, the dumps of equal values differ if one value has shared parts.
    ("case.py", r"return pickle\.dumps\(obj1\) == pickle\.dumps\(obj2\)", r"return obj1 == obj2"),
    ("fuzzing.py", r"''\.join\(payload\)", r"b''.join(payload)"),
    ("fuzzing.py", r"class FuzzingProtocol:", r"class FuzzingProtocol(_borders.Protocol):"),
    ("fuzzing.py", r"json\.dumps\(case,", r"json.dumps(case, default = _borders.text,"),
    # In Python 3, every class is a new-style class with the base `object`.
    (None, r"\(object, Case, ?\)", r"(Case,)"),
    # Division of integers is `//` in Python 3.
    ("case10_1_1.py", r"len\(self\.payload\) / ", r"len(self.payload) // "),
    # zope.interface does not have `implements` any more. The only case that uses it is in no set.
    ("case9_9_1.py", r"from zope\.interface import implements", r"implements = lambda *interfaces: None"),
    # An unused mode. It needs a library that exists only for Python 2.
    ("wstest.py", r"from \. import serializer", r"serializer = None"),
    # The HTML pages are not needed, because the verdicts are in the JSON.
    ("fuzzing.py", r"produceHtml = True", r"produceHtml = False"),
]

# The module that every converted module imports.
BORDERS_MODULE = '''
import binascii


def octets(string):
    """A Python 2 string as bytes."""
    return string.encode("latin-1") if isinstance(string, str) else string


def text(string):
    """Bytes as a Python 2 string."""
    return bytes(string).decode("latin-1") if isinstance(string, (bytes, bytearray)) else string


def hexadecimal(string):
    return binascii.hexlify(octets(string)).decode("ascii")


class Protocol:
    """Stands between the suite's protocol classes and the WebSocket library's."""

    def sendFrame(self, opcode, payload=b"", payload_len=None, **options):
        payload = octets(payload)
        if payload_len is not None:
            # Repeats the payload here, because the library divides integers as in Python 2.
            payload = (payload * (payload_len // len(payload) + 1))[:payload_len]
        super().sendFrame(opcode, payload=payload, **options)

    def sendMessage(self, payload, *args, **options):
        super().sendMessage(octets(payload), *args, **options)

    def sendMessageFrame(self, payload, *args, **options):
        super().sendMessageFrame(octets(payload), *args, **options)

    def sendMessageFrameData(self, payload, *args, **options):
        return super().sendMessageFrameData(octets(payload), *args, **options)

    def sendCloseFrame(self, code=None, reasonUtf8=None, **options):
        super().sendCloseFrame(code=code, reasonUtf8=octets(reasonUtf8), **options)

    def _onMessage(self, payload, isBinary):
        super()._onMessage(text(payload), isBinary)

    def _onPong(self, payload):
        super()._onPong(text(payload))
'''

IMPORT = "from autobahntestsuite import _borders\n"


def main():
    package = pathlib.Path(importlib.util.find_spec("autobahntestsuite").submodule_search_locations[0])
    borders = package / "_borders.py"
    if borders.exists():
        sys.exit(f"{package} is ported already")
    tool = RefactoringTool(get_fixers_from_package("fissix.fixes"))
    for path in sorted(package.rglob("*.py")):
        # Read as Latin-1, each byte of the source becomes one character.
        source = path.read_text(encoding="latin-1").replace("\r\n", "\n")
        source = re.sub(r"(?m)\A((?:#.*\n)?)#.*coding[:=].*\n", r"\1\n", source)
        source = str(tool.refactor_string(source + "\n", str(path)))
        for name, pattern, replacement in BORDERS:
            if name in (None, path.name):
                source = re.sub(pattern, replacement, source)
        if "_borders." in source:
            # After the licence, before the first use.
            head = re.match(r"(?:#.*\n|\s*\n)*", source).end()
            source = source[:head] + IMPORT + source[head:]
        path.write_text(source, encoding="utf-8")
    borders.write_text(BORDERS_MODULE, encoding="utf-8")
    print(f"ported {package}")


if __name__ == "__main__":
    main()
